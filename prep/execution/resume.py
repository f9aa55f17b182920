"""What a build is about to do, kept beside its work: a restart that would do anything else is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prep.config import PrepConfig
from prep.execution.task_store import WorkError
from prep.inputs.files import InputFile, content_digest
from streaming_rwkv.filesystem import write_atomically
from streaming_rwkv.location import is_remote
from streaming_rwkv.shards import FORMAT, MANIFEST_NAME, Manifest, TokenizerRecord

logger = logging.getLogger(__name__)

PLAN_NAME = "plan.json"
_CONTENTS = "contents"
_COMPARED_AT_ONCE = 4
_MOST_CHANGES = 8
_OF_UNITS = ("files/", "config.sources.")


def make_plan(config: PrepConfig, tokenizer: TokenizerRecord, files: dict[str, list[InputFile]]) -> dict[str, Any]:
    """All that decides the output, as plain JSON values."""
    states = {file_name(file): [file.size, file.changed_ns] for of in files.values() for file in of}
    plan = {"format": FORMAT, "config": config.deciding(), "tokenizer": tokenizer.model_dump(), "files": states}
    loaded: dict[str, Any] = json.loads(json.dumps(plan))
    return loaded


def check_plan(
    plan: dict[str, Any],
    *,
    files: dict[str, list[InputFile]],
    out: str,
    folder: Path,
    work: Path,
    manifest: Manifest | None,
    accept_changes: bool = False,
) -> list[str]:
    """Compare with what is there already.

    A file of the same size with another time (copied, cloned, downloaded again) is compared by its content, where a
    finished build noted that.

    Args:
        files: of each source, as the plan was made from them.
        out: where the data set shall be, for errors.
        folder: where it is put together.
        manifest: of a finished build in `out`.
        accept_changes: go on with other files, and other settings of sources, than an unfinished build began with.

    Returns:
        The changes that are accepted. The work on units is named by what decides it and stays; all else goes.

    Raises:
        WorkError: `out` holds another build, or the folder holds other files.
        UserError: a file that is compared by its content cannot be read.
    """
    if is_remote(out) and (folder / MANIFEST_NAME).exists():  # the end of the build would remove its shards
        raise WorkError(f"{folder}: holds a finished data set of its own; choose an empty `work=`")
    has_plan = (work / PLAN_NAME).exists()
    earlier = _read_plan(work / PLAN_NAME) if has_plan else plan
    earlier = _with_states_of_equal_files(earlier, plan, files)
    if manifest is not None:  # somebody else's, perhaps, or copied here without its work: input cannot be compared
        earlier = earlier | {"config": manifest.config, "tokenizer": manifest.tokenizer.model_dump()}
    elif not has_plan:
        strangers = [entry.name for entry in folder.iterdir() if entry != work] if folder.is_dir() else []
        if strangers:
            key = "work" if is_remote(out) else "out"
            raise WorkError(
                f"{folder}: holds other files ({', '.join(sorted(strangers)[:3])}); choose an empty `{key}=`"
            )
        return []
    changes = list(_changes(earlier, plan))
    can_go_on = manifest is None and all(change.startswith(_OF_UNITS) for change in changes)
    if changes and not (can_go_on and accept_changes):
        state = "holds a finished data set" if manifest else "holds an unfinished build"
        remains = f"{out} and {folder}" if is_remote(out) else "the folder"
        shown = "\n".join(f"  {change}" for change in changes[:_MOST_CHANGES])
        more = f"\n  and {len(changes) - _MOST_CHANGES} more" if len(changes) > _MOST_CHANGES else ""
        go_on = "go on with the input as it is now (--accept-changes; what was done with the rest is kept), "
        raise WorkError(
            f"{out}: {state}, and since it began this changed:\n{shown}{more}\n"
            f"undo the change, {go_on if can_go_on else ''}choose another `out=`, or remove {remains} to build anew"
        )
    return changes


def save_plan(plan: dict[str, Any], *, work: Path, contents: dict[str, str] | None = None) -> None:
    """Write the plan; `contents` has each file's digest, once the build has read it all."""
    noted = plan if contents is None else plan | {_CONTENTS: contents}
    write_atomically(work / PLAN_NAME, json.dumps(noted, indent=1, sort_keys=True).encode())


def _read_plan(file: Path) -> dict[str, Any]:
    try:
        plan = json.loads(file.read_bytes())
    except ValueError as error:
        raise WorkError(f"{file}: not valid JSON ({error}); restore it, or remove the folder to build anew") from None
    if not (isinstance(plan, dict) and isinstance(plan.get("files"), dict)):
        raise WorkError(f"{file}: no plan of a build; restore it, or remove the folder to build anew")
    return plan


def file_name(file: InputFile) -> str:
    """What a plan calls a file."""
    return f"{file.source}/{file.name}"


def _with_states_of_equal_files(
    earlier: dict[str, Any], plan: dict[str, Any], files: dict[str, list[InputFile]]
) -> dict[str, Any]:
    """The earlier plan, in which files of the same content are as they are now."""
    contents = earlier.get(_CONTENTS, {})
    earlier = {key: value for key, value in earlier.items() if key != _CONTENTS}
    before, now = earlier["files"], plan["files"]
    touched = [
        file
        for of_source in files.values()
        for file in of_source
        if (name := file_name(file)) in contents and before[name] != now[name] and before[name][0] == now[name][0]
    ]
    if not touched:
        return earlier
    logger.info("comparing %d files of another time by their content", len(touched))
    with ThreadPoolExecutor(_COMPARED_AT_ONCE) as pool:
        digests = list(pool.map(content_digest, touched))
    names = map(file_name, touched)
    equal = {name: now[name] for name, digest in zip(names, digests, strict=True) if digest == contents[name]}
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
        yield f"{path}: {_size(earlier)}, now {_size(now)}"
    elif earlier != now:
        yield f"{path}: was {earlier!r}, is {now!r}"


def _size(state: list[int]) -> str:
    return f"{state[0]} bytes, changed at {state[1] / 1e9:.3f}"
