"""`open_dataset` gives the steps that a real run by `composer train.py` has trained on, as its log of streams tells."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from streaming_rwkv import open_dataset
from tests.fork_server import ForkServer
from tests.train.test_runs import FREEZE, TRAIN, Workplace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STAGES = [{"tokens": 800, "sources": {"web": 0.5, "code": 0.5}}, {"passes": 0.6}]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_trains_on_these_steps(
    processes: int, write_data_set: Callable[..., Path], programs: ForkServer, tmp_path: Path
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(FREEZE)
    data = write_data_set(tmp_path / "data", TRAIN)
    place = Workplace(data=data, folder=tmp_path, programs=programs)
    settings = [f"data.stages={json.dumps(STAGES)}", "log.interval_steps=1", "seed=23"]
    status, output = place.train(tmp_path / "run", *settings, processes=processes)
    assert status == 0, output
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = {line["step"]: line for line in lines if any(key.startswith("share/") for key in line)}

    targets: Counter[str] = Counter()
    with open_dataset(data, stages=STAGES, batch_packs=4, seed=23, workers=0) as dataset:
        assert list(trained) == list(range(1, len(dataset) + 1))
        for batch in dataset:
            for stream, size in zip(batch["streams"].tolist(), batch["pack_starts"].diff().tolist(), strict=True):
                targets[f"{dataset.streams[stream].source}/{dataset.streams[stream].bucket}"] += size
            shares = {f"share/{name}": count / targets.total() for name, count in targets.items()}
            found = {key: value for key, value in trained[dataset.step].items() if key.startswith("share/")}
            assert found == pytest.approx(shares, rel=1e-9)  # the log's digits
