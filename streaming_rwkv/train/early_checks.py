"""Checks of a run that need no torch: a wrong path is reported before torch and Composer are imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from streaming_rwkv.config import ConfigError
from streaming_rwkv.distributed import local_world_size
from streaming_rwkv.extras import install_command
from streaming_rwkv.model.marked_files import CheckpointError, check_exists
from streaming_rwkv.outputs import CHECKPOINTS, check_save_folder
from streaming_rwkv.shards import check_is_finished
from streaming_rwkv.train.config import EvaluationConfig, RunConfig


def check_paths(config: RunConfig) -> None:
    """Refuse a run whose local data set, initial weights or tasks are missing here, or that is saved in a data set.

    Raises:
        UserError: names the setting and the path.
    """
    check_tasks(config.evaluation)
    if (os.environ.get("RANK") or "0") == "0":  # the only one that writes there, perhaps already
        check_save_folder(config.save_folder)
    check_is_finished(config.data.path, setting="data.path")
    if config.model.init_from is None or may_resume(config) or is_one_of_many_nodes():
        return
    try:
        check_exists(config.model.init_from)
    except CheckpointError as error:
        raise ConfigError(f"model.init_from: {error}") from None


def check_replicas(config: RunConfig, *, processes: int) -> None:
    """Refuse a number of processes that is not a multiple of `parallel.replicas`.

    Raises:
        ConfigError: names both numbers, and the replicas that are possible.
    """
    replicas = config.parallel.replicas
    if processes % replicas:
        divisors = [number for number in range(1, processes + 1) if processes % number == 0]
        raise ConfigError(
            f"parallel.replicas: found {replicas}, but the number of processes, {processes}, is not a multiple of it; "
            f"expected {' or '.join(map(str, divisors))}, or start a multiple of {replicas} processes (processes=N)"
        )


def check_tasks(evaluation: EvaluationConfig) -> None:
    """Refuse tasks without the package that scores them, and a folder of tasks that is not there.

    Raises:
        ConfigError: names the setting, and the extra that installs the package.
    """
    if not evaluation.tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"evaluation.tasks: the package 'lm_eval' is not installed; run {install_command('tasks')}, or leave "
            "evaluation.tasks out"
        )
    folder = evaluation.task_folder
    if folder is not None and not is_one_of_many_nodes() and not Path(folder).is_dir():
        raise ConfigError(f"evaluation.task_folder: {folder}: no such folder; expected one with task YAMLs")


def may_resume(config: RunConfig) -> bool:
    """Return True if there may be a checkpoint of this run, which then needs its initial weights no longer."""
    return config.save_remote is not None or (Path(config.save_folder) / CHECKPOINTS).exists()


def is_one_of_many_nodes() -> bool:
    """Return True if only the node of rank 0 needs the initial weights."""
    return int(os.environ.get("WORLD_SIZE", "1")) > local_world_size()
