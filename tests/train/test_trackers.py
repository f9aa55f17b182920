"""W&B and MLflow: what Composer's loggers are built with; whole runs where the packages are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streaming_rwkv.config import ConfigError, validate
from streaming_rwkv.train.config import LogConfig, MlflowConfig, WandbConfig
from streaming_rwkv.train.trackers import (
    build_trackers,
    check_trackers,
    flat_settings,
    mlflow_arguments,
    tracking_id,
    wandb_arguments,
)

ROOT = Path(__file__).parents[2]


def test_wandb_gets_its_settings_and_resumes_its_run() -> None:
    config = validate(WandbConfig, {"project": "rwkv", "group": "stage2", "tags": ["0.4B"]}, where="log.wandb")
    assert wandb_arguments(config, tracking_id="abc") == {
        "project": "rwkv",
        "group": "stage2",
        "tags": ["0.4B"],
        "init_kwargs": {"id": "abc", "resume": "allow"},
    }


def test_mlflow_gets_its_settings_and_resumes_its_run() -> None:
    given = {"experiment_name": "rwkv", "tracking_uri": "file:///runs/mlflow", "tags": {"size": "0.4B"}}
    assert mlflow_arguments(validate(MlflowConfig, given, where="log.mlflow")) == {
        "experiment_name": "rwkv",
        "tracking_uri": "file:///runs/mlflow",
        "tags": {"size": "0.4B"},
        "log_system_metrics": False,
        "resume": True,
    }


def test_nothing_is_tracked_by_default(tmp_path: Path) -> None:
    assert build_trackers(LogConfig(), save_folder=tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_save_folder_keeps_the_name_of_its_tracked_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = tracking_id(tmp_path / "a")
    assert len(first) == 16
    assert tracking_id(tmp_path / "a") == first
    assert tracking_id(tmp_path / "b") != first


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"wandb": {"api_key": "0123"}}, "log.wandb.api_key: unknown key; allowed here: entity, group, name"),
        ({"mlflow": {"tracking_uri": "https://me:secret@example.org"}}, "log.mlflow.tracking_uri: holds a user name"),
        ({"mlflow": {"tracking_token": "0123"}}, "log.mlflow.tracking_token: unknown key"),
    ],
)
def test_secrets_in_a_configuration_are_refused(values: dict[str, Any], error: str) -> None:
    class Run(LogConfig):
        log: LogConfig

    with pytest.raises(ConfigError) as caught:
        validate(Run, {"log": values}, where="run.yaml")
    assert f"run.yaml: {error}" in str(caught.value)


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named_with_its_extra(package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError) as caught:
        check_trackers(validate(LogConfig, {package: {}}, where="log"))
    assert str(caught.value) == (
        f"log.{package}: the package {package!r} is not installed; run `pip install '.[{package}]'` in a clone of "
        f"streaming-rwkv, or leave log.{package} out"
    )


def test_settings_are_named_as_overrides_name_them() -> None:
    settings = {
        "seed": 1,
        "data": {"stages": [{"tokens": 5, "sources": {"web": 1.0}}]},
        "optimizer": {"betas": [0.9, 0.99]},
    }
    assert flat_settings(settings) == {
        "seed": 1,
        "data.stages.0.tokens": 5,
        "data.stages.0.sources.web": 1.0,
        "optimizer.betas": [0.9, 0.99],
    }


def train(data: Path, save_folder: Path, *overrides: str, **environment: str) -> None:
    command = [
        sys.executable, "train.py", "yamls/tiny_cpu.yaml", f"data.path={data}", f"save_folder={save_folder}",
        "model.hidden_size=64", "model.num_layers=1", "data.batch_packs=4", "data.workers=0",
        "evaluation.interval_steps=3", "evaluation.prompts=[w3]", "evaluation.sample_tokens=4",
        "log.tensorboard=false", *overrides,
    ]  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(write_data_set: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked") / "data"
    return write_data_set(folder, {("web", 1, 16): 24}, validation={("web", 1, 16): 4})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_resumed_run_is_one_run_in_mlflow(data: Path, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    store = (tmp_path / "store").as_uri()
    tracked = [f"log.mlflow={{experiment_name: rwkv, tracking_uri: '{store}'}}", "checkpoint.interval_steps=3"]
    train(data, tmp_path / "run", *tracked)
    more = ["data.stages.0.passes=2", "checkpoint.allow_changed=[mixture]"]
    train(data, tmp_path / "run", *tracked, *more)  # resumes
    train(data, tmp_path / "other" / "run", *tracked)  # of the same name, but another

    client = mlflow.MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("rwkv").experiment_id])
    assert len(runs) == 2
    (run,) = (run for run in runs if run.data.tags["run_name"] == tracking_id(tmp_path / "run"))
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.002"
    logged = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "loss/train/total")}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = {line["step"]: line["loss/train/total"] for line in lines if "loss/train/total" in line}
    assert len(ours) == 12
    assert sorted(logged.values()) == pytest.approx(sorted(ours.values()))
    assert "samples.json" in [file.path for file in client.list_artifacts(run.info.run_id)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_tracked_by_wandb(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    train(data, tmp_path / "run", "log.wandb={project: rwkv, tags: [tiny]}", **offline)
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert written.name == f"run-{tracking_id(tmp_path / 'run')}.wandb"
    content = written.read_bytes()
    for name in (b"rwkv", b"tiny", b"loss/train/total", b"validation/bits_per_byte/all", b"optimizer.lr"):
        assert name in content, name
