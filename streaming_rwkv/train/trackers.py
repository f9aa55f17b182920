"""Trackers of a run: Weights & Biases and MLflow, through Composer's loggers.

A save folder has one tracked run, however often it is started: its name is generated at the first start and kept in
`{save_folder}/tracking-id`. Credentials are given to the trackers themselves (`wandb login`, WANDB_API_KEY,
MLFLOW_TRACKING_USERNAME, …); the configuration is saved beside the checkpoints and has no setting for them.
"""

from __future__ import annotations

import importlib.util
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import LoggerDestination, MLFlowLogger, WandBLogger

from streaming_rwkv.config import ConfigError
from streaming_rwkv.distributed import is_rank_zero
from streaming_rwkv.extras import install_command
from streaming_rwkv.filesystem import read_regular_file, write_atomically
from streaming_rwkv.train.config import LogConfig, MlflowConfig, WandbConfig

TRACKING_ID_NAME = "tracking-id"


def check_trackers(log: LogConfig) -> None:
    """Refuse, before anything is loaded, a tracker whose package is not installed.

    Raises:
        ConfigError: its text names the extra that installs the package.
    """
    for package, config in (("wandb", log.wandb), ("mlflow", log.mlflow)):
        if config is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"log.{package}: the package {package!r} is not installed; run {install_command(package)}, "
                f"or leave log.{package} out"
            )


def tracking_id(save_folder: Path) -> str:
    """Return the name of this save folder's tracked run; it is generated at the first start."""
    path = save_folder / TRACKING_ID_NAME
    try:
        found = read_regular_file(path, most=100, follow=False).decode(errors="replace")
    except FileNotFoundError:
        write_atomically(path, uuid.uuid4().hex[:16].encode())
        return tracking_id(save_folder)
    if not re.fullmatch(r"[\w.-]+", found):
        raise ConfigError(f"{path}: found {found!r}, expected the name of a tracked run; remove the file for a new one")
    return found


def wandb_arguments(config: WandbConfig, *, tracking_id: str) -> dict[str, Any]:
    """Return the arguments of Composer's WandBLogger."""
    given = config.model_dump(exclude_none=True, exclude={"tags"})
    tags = {"tags": config.tags} if config.tags else {}
    return {**given, **tags, "init_kwargs": {"id": tracking_id, "resume": "allow"}}


def mlflow_arguments(config: MlflowConfig) -> dict[str, Any]:
    """Return the arguments of Composer's MLFlowLogger."""
    return {**config.model_dump(exclude_none=True), "tags": dict(config.tags), "resume": True}


class ResumedMLFlowLogger(MLFlowLogger):
    """MLFlowLogger that resumes the save folder's own run; Composer's resumes the newest run of the same name."""

    def __init__(self, *, tracking_id: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.tracking_id = tracking_id

    def _start_mlflow_run(self, state: State) -> None:
        self.tags["run_name"] = self.tracking_id  # the tag by which Composer finds the run
        super()._start_mlflow_run(state)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Log the parameters that the run does not have yet.

        MLflow refuses a changed value, and the whole batch with it.
        """
        if self._enabled:
            known = self._mlflow_client.get_run(self._run_id).data.params
            super().log_hyperparameters({name: value for name, value in hyperparameters.items() if name not in known})


def flat_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings by dotted keys, as on the command line; lists of settings by index."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        nested = isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value)
        entries = value.items() if isinstance(value, dict) else enumerate(value) if nested else None
        if entries is None:
            yield key, value
            return
        for name, entry in entries:
            yield from walk(entry, f"{key}.{name}" if key else str(name))

    return dict(walk(dict(values), ""))


def build_trackers(log: LogConfig, *, save_folder: Path) -> list[LoggerDestination]:
    """Return Composer's loggers for the configured trackers; they write only on rank 0."""
    if log.wandb is None and log.mlflow is None:
        return []
    ours = tracking_id(save_folder) if is_rank_zero() else ""
    trackers: list[LoggerDestination] = []
    if log.wandb is not None:
        trackers.append(WandBLogger(**wandb_arguments(log.wandb, tracking_id=ours)))
    if log.mlflow is not None:
        trackers.append(ResumedMLFlowLogger(tracking_id=ours, **mlflow_arguments(log.mlflow)))
    return trackers
