"""The state of a build: everything that decides its output, saved beside its work.

A start that would build anything else from the same work is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.config import PrepConfig
from prep.execution.task_store import WorkError
from prep.inputs.files import InputFile, content_digest
from prep.inputs.hooks import recipe_identity
from streaming_rwkv.errors import UserError
from streaming_rwkv.filesystem import read_regular_file, write_atomically
from streaming_rwkv.location import is_remote
from streaming_rwkv.shards import FORMAT, LARGEST_FILE_BYTES, MANIFEST_NAME, Manifest, TokenizerRecord
from streaming_rwkv.version import PROGRAM

logger = logging.getLogger(__name__)

STATE_NAME = "state.json"
_STATE_NAME_OF_VERSION_1 = "plan.json"
_CONTENTS = "contents"
_COMPARED_AT_ONCE = 4
_MOST_CHANGES = 8
_CHANGES_OF_INPUT = ("files/", "config.sources.")


@dataclass(frozen=True, kw_only=True)
class BuildState:
    """Everything that decides the output of a build."""

    config: PrepConfig
    files: dict[str, list[InputFile]]  # of each source
    values: dict[str, Any]  # format, config, tokenizer and files as plain JSON values

    def save(self, *, contents: dict[str, str] | None = None) -> None:
        """Write the state to the work folder.

        Args:
            contents: the digest of each file by its `state_key`, when the build has read all files.
        """
        values = self.values if contents is None else self.values | {_CONTENTS: contents}
        file = self.config.work_folder / STATE_NAME
        write_atomically(file, json.dumps(values, indent=1, sort_keys=True).encode())


def build_state(config: PrepConfig, tokenizer: TokenizerRecord, files: dict[str, list[InputFile]]) -> BuildState:
    """Return the state of a build that is about to start."""
    states = {state_key(file): [file.size, file.changed_ns] for of_source in files.values() for file in of_source}
    values = {"format": FORMAT, "config": recipe_identity(config), "tokenizer": tokenizer.model_dump(), "files": states}
    return BuildState(config=config, files=files, values=json.loads(json.dumps(values)))


def state_key(file: InputFile) -> str:
    """Return the key of a file in the state."""
    return f"{file.source}/{file.name}"


def check_resumable(state: BuildState, *, manifest: Manifest | None, accept_changes: bool = False) -> list[str]:
    """Compare the state with that of the build that was started in the same place before.

    If a file has the same size and another time (it was copied, cloned or downloaded again), its content is compared,
    provided that a finished build has noted the digest.

    Args:
        manifest: of a finished data set at `out`.
        accept_changes: continue an unfinished build with other files, or other settings of sources.

    Returns:
        The changes that are accepted. The names of unit tasks depend on all that decides their result, so the work on
        unchanged units can stay; all other work has to be removed.

    Raises:
        WorkError: `out` holds another build, or the folder holds other files.
        UserError: a file whose content is compared cannot be read.
    """
    config = state.config
    _check_folder(config)
    has_state = (config.work_folder / STATE_NAME).exists()
    earlier = _read_values(config.work_folder / STATE_NAME) if has_state else state.values
    earlier = _with_states_of_equal_files(earlier, state)
    if manifest is not None:  # from another place, perhaps, or copied here without its work: input cannot be compared
        earlier = earlier | {"config": manifest.config, "tokenizer": manifest.tokenizer.model_dump()}
    elif not has_state:
        _check_no_unexpected_files(config)
        return []
    changes = list(_changes(earlier, state.values))
    is_acceptable = manifest is None and all(change.startswith(_CHANGES_OF_INPUT) for change in changes)
    if changes and not (is_acceptable and accept_changes):
        raise _refusal(config, changes, is_finished=manifest is not None, is_acceptable=is_acceptable)
    return changes


def _check_folder(config: PrepConfig) -> None:
    if is_remote(config.out) and (config.folder / MANIFEST_NAME).exists():  # the end of the build removes its shards
        raise WorkError(f"{config.folder}: holds a finished data set of its own; choose an empty `work=`")
    if (config.work_folder / _STATE_NAME_OF_VERSION_1).exists():
        raise WorkError(
            f"{config.work_folder}: holds work of an earlier version, which cannot be continued; remove "
            f"{config.folder} and run `{PROGRAM} prepare` again, or choose another `out=`"
        )


def _check_no_unexpected_files(config: PrepConfig) -> None:
    if not config.folder.is_dir():
        return
    unexpected = sorted(entry.name for entry in config.folder.iterdir() if entry != config.work_folder)
    if unexpected:
        key = "work" if is_remote(config.out) else "out"
        raise WorkError(f"{config.folder}: holds other files ({', '.join(unexpected[:3])}); choose an empty `{key}=`")


def _refusal(config: PrepConfig, changes: list[str], *, is_finished: bool, is_acceptable: bool) -> WorkError:
    state = "holds a finished data set" if is_finished else "holds an unfinished build"
    remains = f"{config.out} and {config.folder}" if is_remote(config.out) else "the folder"
    shown = "\n".join(f"  {change}" for change in changes[:_MOST_CHANGES])
    more = f"\n  and {len(changes) - _MOST_CHANGES} more" if len(changes) > _MOST_CHANGES else ""
    accept = (
        "continue with the input as it is now (--accept-changes, in Python accept_changes=True; finished work on "
        "unchanged input is kept), "
        if is_acceptable
        else ""
    )
    return WorkError(
        f"{config.out}: {state}, and since it began this changed:\n{shown}{more}\n"
        f"undo the change, {accept}choose another `out=`, or remove {remains} to build from the beginning"
    )


def _read_values(file: Path) -> dict[str, Any]:
    remedy = "restore it, or remove the folder to build from the beginning"
    try:
        values = json.loads(read_regular_file(file, most=LARGEST_FILE_BYTES))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise WorkError(f"{file}: not valid JSON ({error}); {remedy}") from None
    if not (isinstance(values, dict) and _are_states(values.get("files"), values.get(_CONTENTS, {}))):
        raise WorkError(f"{file}: not the state of a build; {remedy}")
    return values


def _are_states(files: Any, contents: Any) -> bool:
    """Return True for [size, time] of each file, and digests of some of them."""
    return (
        isinstance(files, dict)
        and isinstance(contents, dict)
        and set(contents) <= set(files)
        and all(
            isinstance(state, list) and [type(number) for number in state] == [int, int] for state in files.values()
        )
    )


def _with_states_of_equal_files(earlier: dict[str, Any], state: BuildState) -> dict[str, Any]:
    """Return the earlier values, with files of the same content in their present state."""
    contents = earlier.get(_CONTENTS, {})
    earlier = {key: value for key, value in earlier.items() if key != _CONTENTS}
    before, now = earlier["files"], state.values["files"]
    touched = [
        file
        for of_source in state.files.values()
        for file in of_source
        if (key := state_key(file)) in contents and before[key] != now[key] and before[key][0] == now[key][0]
    ]
    if not touched:
        return earlier
    logger.info("comparing the content of %d files whose time has changed", len(touched))
    with ThreadPoolExecutor(_COMPARED_AT_ONCE) as pool:
        digests = list(pool.map(content_digest, touched))
    keys = map(state_key, touched)
    equal = {key: now[key] for key, digest in zip(keys, digests, strict=True) if digest == contents[key]}
    return earlier | {"files": before | equal}


def _changes(earlier: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted({*earlier, *now}):
            below = f"{path}/{key}" if path.startswith("files") else f"{path}.{key}" if path else key
            if key not in now:
                yield f"{below}: gone"
            elif key not in earlier:
                yield f"{below}: new"
            else:
                yield from _changes(earlier[key], now[key], below)
    elif earlier != now and path.startswith("files/"):
        yield f"{path}: {_file_state(earlier)}, now {_file_state(now)}"
    elif earlier != now:
        yield f"{path}: was {earlier!r}, is {now!r}"


def _file_state(state: list[int]) -> str:
    return f"{state[0]} bytes, changed at {state[1] / 1e9:.3f}"
