"""examples/fit_mixture.py with real proxies: finished ones are kept, an unfinished one resumes, more are added."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.example_modules import FOLDER
from tests.fork_server import ForkServer
from tests.train.conftest import BuildDataSet

SETTINGS = {
    "save_folder": "unused",
    "data": {"batch_packs": 1, "workers": 0, "fraction": 0.5, "stages": [{"tokens": 12_000}]},
    "model": {"hidden_size": 64, "num_layers": 1},
    "optimizer": {"lr": 1e-2, "lr_final": 1e-3},
    "checkpoint": {"interval_steps": 3},
    "log": {"tensorboard": False},
}


@pytest.mark.slow
def test_proxies_are_trained_once_resumed_and_fitted(
    tmp_path: Path, build_data_set: BuildDataSet, programs: ForkServer
) -> None:
    data = build_data_set(tmp_path, sources=["web", "code"], pack_tokens=2048, documents_per_bucket=3)
    (tmp_path / "proxy.yaml").write_text(yaml.safe_dump(SETTINGS))
    folder = tmp_path / "proxies"
    command = [
        sys.executable, FOLDER / "fit_mixture.py", tmp_path / "proxy.yaml", folder, f"data.path={data}",
        "--weights", "web=1",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = programs.run([*command, "--proxies", "4"], timeout=600, check=True, env=environment)
    assert "finished before" not in done.stdout
    results = [json.loads((folder / f"proxy-{number:02}" / "result.json").read_bytes()) for number in range(4)]
    assert all(set(result["bits_per_byte"]) == {"web", "code"} for result in results)
    by_share = sorted((result["sources"]["web"], result["bits_per_byte"]["web"]) for result in results)
    assert by_share[-1][1] < by_share[0][1]  # more of a source, fewer bits: each has words of its own
    first_words = [line.partition(" ")[0] for line in done.stdout.splitlines()]
    assert first_words[first_words.index("mixture") :][:5] == ["mixture", "natural", "proxy-01", "proxy-02", "proxy-03"]

    (folder / "proxy-02" / "result.json").unlink()  # as if it had been stopped after its first checkpoint
    checkpoints = sorted((folder / "proxy-02" / "checkpoints").iterdir())
    assert len(checkpoints) > 1
    for checkpoint in checkpoints[1:]:
        shutil.rmtree(checkpoint)
    written = (folder / "proxy-00" / "metrics.jsonl").stat().st_mtime_ns
    done = programs.run([*command, "--proxies", "5"], timeout=600, check=True, env=environment)
    assert done.stdout.count("finished before") == 3
    assert done.stdout.count("resuming from") == 1
    assert json.loads((folder / "proxy-02" / "result.json").read_bytes()) == results[2]  # on the CPU, bit for bit
    assert (folder / "proxy-04" / "result.json").exists()
    assert (folder / "proxy-00" / "metrics.jsonl").stat().st_mtime_ns == written
