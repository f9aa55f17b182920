"""docs/mixtures.md: its YAML is valid."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from streaming_rwkv.config import validate
from streaming_rwkv.data.mixture import make_plan
from streaming_rwkv.shards import ShardRecord, StreamRecord
from streaming_rwkv.train.config import DataConfig

PAGE = Path(__file__).parent.parent / "docs" / "mixtures.md"
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def stream(source: str, lower: int, upper: int) -> StreamRecord:
    shard = ShardRecord(basename="shard.00000.mds.zstd", bytes=1, sha256="", raw_bytes=1, raw_sha256="", packs=100_000)
    return StreamRecord(
        split="train", source=source, lower=lower, upper=upper, documents=1, pieces=1, targets=800_000_000,
        bytes=1, packs=100_000, index_sha256="", shards=[shard],
    )  # fmt: skip


def test_the_page_has_examples():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_can_be_planned(example):
    config = validate(DataConfig, OmegaConf.to_container(OmegaConf.create(example))["data"], where="data")
    bounds = [(1, 256), (257, 512), (513, 1024), (1025, 2048)][: 3 if "513-1024" in example else 4]
    streams = [stream(source, *bound) for source in ("fineweb-edu", "python-edu") for bound in bounds]
    plan = make_plan(config.stages, streams, batch_packs=128, seed=1, block_shards=4)
    assert plan.steps > 1000
