"""Names that errors give to settings: the keys of a run's YAML, or the arguments of a function or a command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SettingNames:
    """Names for errors, by default those of a run's settings.

    Fields:
        to_save_memory: what else to do when a loader process was killed for its memory.
    """

    path: str = "data.path"
    batch: str = "`data.batch_tokens` or `data.batch_packs`"
    cache: str = "data.cache"
    workers: str = "data.workers"
    timeout_seconds: str = "data.timeout_seconds"
    to_save_memory: str = (
        "set `data.workers` or `data.fetch_ahead` lower; the same command resumes from the newest checkpoint"
    )


RUN_SETTINGS = SettingNames()
ARGUMENTS = SettingNames(  # of `open_dataset`
    path="location",
    batch="`batch_tokens` or `batch_packs`",
    cache="cache",
    workers="workers",
    timeout_seconds="timeout_seconds",
    to_save_memory="set `workers` lower; a dataset that is opened with `start_step` continues",
)
