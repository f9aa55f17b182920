"""Every YAML of the repository is valid, and stage 1 and stage 2 run on a CPU with nothing but overrides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prep.config import PrepConfig
from streaming_rwkv.config import load_config
from streaming_rwkv.data.mixture import make_plan
from streaming_rwkv.inference import command_line
from streaming_rwkv.inference.sampling import generate_tokens
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.weights import read_model, read_state
from streaming_rwkv.tokenizer import load_tokenizer
from streaming_rwkv.train.config import RunConfig
from streaming_rwkv.train.prepare import prepare
from tests.data.streams import stream
from tests.fork_server import ForkServer
from tools.ports import free_ports

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "yamls").rglob("*.yaml"))
STAGE1 = ["c4-en", "c4-zh"]
STAGE2 = ["cosmopedia-v2", "fineweb-edu", "chinese-fineweb-edu", "industry-program", "industry-edu",
          "industry-politic", "python-edu"]  # fmt: skip
SMALL = [
    "model.activation_checkpointing=false", "data.batch_tokens=4096", "data.workers=0", "microbatch_packs=1",
    "evaluation.packs_per_stream=1", "log.interval_steps=1", "log.tensorboard=false",
]  # fmt: skip


def is_recipe(path: Path) -> bool:
    return path.parent.name == "prep" or path.name == "prep.yaml"


def test_the_repository_has_recipes_and_runs() -> None:
    names = [str(path.relative_to(ROOT / "yamls")) for path in YAMLS]
    assert {"prep/stage1.yaml", "prep/stage2.yaml", "stage1.yaml", "stage2.yaml", "tiny_cpu.yaml"} <= set(names)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT / "yamls")))
def test_a_yaml_is_valid(path: Path) -> None:
    load_config(PrepConfig if is_recipe(path) else RunConfig, path)  # type: ignore[type-var]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_run_names_the_sources_of_its_recipe(stage: str) -> None:
    recipe = load_config(PrepConfig, ROOT / "yamls" / "prep" / f"{stage}.yaml")
    run = load_config(RunConfig, ROOT / "yamls" / f"{stage}.yaml")
    for part in run.data.stages:
        assert part.sources is not None
        assert part.sources.keys() == recipe.sources.keys()
        assert sum(part.sources.values()) == pytest.approx(1)
        if part.buckets is not None:
            lower_upper = [tuple(map(int, bucket.split("-"))) for bucket in part.buckets]
            assert [upper for _, upper in lower_upper] == recipe.edges
            assert sum(part.buckets.values()) == pytest.approx(1)


@pytest.fixture(scope="module")
def data(build_data_set: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("yamls")
    return {
        name: build_data_set(folder / name, sources=sources, pack_tokens=2048)
        for name, sources in (("stage1", STAGE1), ("stage2", STAGE2))
    }


def overrides_of(stage: str, data: Path, save_folder: Path) -> list[str]:
    return [f"data.path={data}", f"data.cache={data.parent / 'cache'}", f"save_folder={save_folder / stage}", *SMALL]


def test_the_shares_of_stage_2_can_be_met_in_each_of_its_three_parts(data: dict[str, Path], tmp_path: Path) -> None:
    """Shares do not depend on the sizes of buckets, as long as each source has documents in each."""
    settings = [*overrides_of("stage2", data["stage2"], tmp_path), "model.init_from=null", "model.preset=0.1B"]
    config = load_config(RunConfig, ROOT / "yamls" / "stage2.yaml", overrides=settings)
    prepared = prepare(config, world_size=1, fetch=True)
    expected = prepared.plan.expected_targets()
    for part, tokens, targets in zip(config.data.stages, (4e9, 12e9, 4e9), expected, strict=True):
        assert targets.sum() == pytest.approx(tokens, rel=1e-4)
        names = [(stream.source, stream.bucket) for stream in prepared.plan.streams]
        for by, wanted in ((0, part.sources), (1, part.buckets)):
            for name, share in (wanted or {}).items():
                got = sum(t for key, t in zip(names, targets, strict=True) if key[by] == name) / targets.sum()
                assert got == pytest.approx(share, abs=1e-4), name


@torch.no_grad()
def clear_choices(model: RWKV7, prompt: list[int], ids: list[int]) -> int:
    """The number of likeliest tokens in `ids` before the first that another CPU's rounding might not choose."""
    unread, state = prompt, None
    for number, token in enumerate(ids):
        logits, state = model.step(torch.tensor([unread]), state)
        likeliest, next_likely = logits[0].topk(2).values
        if likeliest - next_likely < 1e-3:  # far more than two implementations in float32 differ by
            return number
        unread = [token]
    return len(ids)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.end_to_end
def test_stage_1_then_stage_2_run_on_a_cpu_with_overrides_only(
    data: dict[str, Path], programs: ForkServer, tmp_path: Path
) -> None:
    def run(stage: str, *more: str) -> str:
        command = [
            Path(sys.executable).with_name("composer"), "-n", "1", "--master_port", str(free_ports(1)[0]),
            "train.py", f"yamls/{stage}.yaml", *overrides_of(stage, data[stage], tmp_path), *more,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = programs.run(command, cwd=ROOT, env=environment, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def train(stage: str, *more: str) -> list[dict[str, float]]:
        run(stage, *more)
        lines = (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    shape = ["model.preset=null", "model.hidden_size=64", "model.num_layers=2"]
    first = train("stage1", *shape, "data.stages.0.tokens=40_000", "optimizer.lr=5e-3", "optimizer.warmup_tokens=8000")
    losses = [line["loss/train/total"] for line in first if "loss/train/total" in line]
    assert losses[0] == pytest.approx(5.67, abs=0.1)  # ln 257 + 0.12
    assert losses[-1] < losses[0] - 1

    tokens = [f"data.stages.{i}.tokens={tokens}" for i, tokens in enumerate((8000, 24_000, 8000))]
    settings = [
        f"model.init_from={tmp_path / 'stage1'}", *tokens, "optimizer.lr=1e-4", "optimizer.warmup_tokens=0"
    ]  # fmt: skip
    second = train("stage2", *settings)
    losses = [line["loss/train/total"] for line in second if "loss/train/total" in line]
    assert losses[0] < 5.67 - 1  # it has learnt something in stage 1
    stages = [line["stage"] for line in second if "stage" in line]
    assert sorted(set(stages)) == [0, 1, 2]
    shares = {name.split("/")[1] for line in second for name in line if name.startswith("share/")}
    assert len(shares) >= 4  # of seven: 20 packs of a small run have not room for those of a share of 5 %
    assert shares <= set(STAGE2)
    folder = tmp_path / "stage2" / "checkpoints"
    (last,) = folder.iterdir()
    (first_stage,) = (tmp_path / "stage1" / "checkpoints").glob("step-*")
    before, after = read_state(first_stage), read_state(last)
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert not torch.equal(before["head.weight"], after["head.weight"])
    (tmp_path / "stage1").rename(tmp_path / "put away")  # the initial weights are no longer needed
    assert "this run is finished" in run("stage2", *settings)

    # The trained model, exported, continues a text in BlinkDL's package as it does in ours.
    assert command_line.export([str(tmp_path / "stage2"), str(tmp_path / "model.pth")]) == 0
    tokenizer_json = tmp_path / "stage2" / "tokenizer" / "tokenizer.json"
    worker = [
        ROOT / "tests" / "inference" / "rwkv_worker.py",
        tmp_path / "model.pth",
        tokenizer_json,
        0,
        "abc de",
        tmp_path / "out",
    ]
    subprocess.run([sys.executable, *map(str, worker)], check=True, capture_output=True, timeout=200)
    their_ids, their_text = json.loads((tmp_path / "out").read_text())
    tokenizer = load_tokenizer(tmp_path / "stage2" / "tokenizer")
    prompt = [tokenizer.bos_id, *tokenizer.encode("abc de").tolist()]
    model = read_model(tmp_path / "model.pth")
    ids = list(generate_tokens(model, prompt, max_tokens=100, temperature=0, stop={tokenizer.eos_id}))
    ours, theirs = ([*found, tokenizer.eos_id][:100] for found in (ids, their_ids))  # its end is a choice too
    compared = clear_choices(model, prompt, ours)
    assert compared >= 5
    assert ours[:compared] == theirs[:compared]
    assert tokenizer.decode(their_ids) == their_text
    assert len(ids) > 20


def test_stage_3_reads_long_documents_in_the_shares_that_it_names() -> None:
    recipe = load_config(PrepConfig, ROOT / "yamls" / "prep" / "long.yaml")
    run = load_config(RunConfig, ROOT / "yamls" / "stage3_long.yaml")
    assert recipe.pack_tokens == recipe.edges[-1] == 32768
    bounds = list(zip([1, *(edge + 1 for edge in recipe.edges)], recipe.edges, strict=False))
    streams = [
        stream(source, upper, 400, targets_per_pack=32_000).model_copy(update={"lower": lower})
        for source in recipe.sources
        for lower, upper in bounds
    ]
    plan = make_plan(run.data.stages, streams, batch_packs=32, seed=17, block_shards=4)
    for part, targets in zip(run.data.stages, plan.expected_targets(), strict=True):
        assert targets.sum() == pytest.approx(part.tokens, rel=1e-3)  # whole steps of a million tokens
        by_bucket = {
            f"{lower}-{upper}": sum(t for s, t in zip(streams, targets, strict=True) if s.lower == lower)
            for lower, upper in bounds
        }
        assert by_bucket["1-1024"] == 0
        for bucket, share in (part.buckets or {}).items():
            assert by_bucket[bucket] / targets.sum() == pytest.approx(share, abs=1e-3), bucket
