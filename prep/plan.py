"""What a build is about to do, kept beside its work: a restart that would do anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prep.config import PrepConfig
from prep.sources import Unit
from prep.work import WorkError, write_durably
from streaming_rwkv.shards import FORMAT, MANIFEST_NAME, Manifest, TokenizerRecord, read_manifest

PLAN_NAME = "plan.json"
_MOST_CHANGES = 8


def make_plan(config: PrepConfig, tokenizer: TokenizerRecord, units: Sequence[Unit]) -> dict[str, Any]:
    """All that decides the output, as plain JSON values."""
    files = {
        f"{part.file.source}/{part.file.name}": [part.file.size, part.file.changed_ns]
        for unit in units
        for part in unit.parts
    }
    plan = {"format": FORMAT, "config": config.deciding(), "tokenizer": tokenizer.model_dump(), "files": files}
    loaded: dict[str, Any] = json.loads(json.dumps(plan))
    return loaded


def check_plan(plan: dict[str, Any], *, out: Path, work: Path) -> Manifest | None:
    """Compare with what `out` already holds; the manifest of a finished build of the same plan, or None.

    Raises:
        WorkError: `out` holds another build, or other files.
    """
    manifest = read_manifest(out) if (out / MANIFEST_NAME).exists() else None
    if (work / PLAN_NAME).exists():
        earlier = json.loads((work / PLAN_NAME).read_bytes())
    elif manifest is not None:  # copied here without its work folder: its input cannot be compared
        earlier = plan | {"config": manifest.config, "tokenizer": manifest.tokenizer.model_dump()}
    else:
        strangers = [entry.name for entry in out.iterdir() if entry != work] if out.is_dir() else []
        if strangers:
            raise WorkError(f"{out}: holds other files ({', '.join(sorted(strangers)[:3])}); choose an empty `out=`")
        return None
    changes = list(_changes(earlier, plan))
    if changes:
        state = "holds a finished data set" if manifest else "holds an unfinished build"
        shown = "\n".join(f"  {change}" for change in changes[:_MOST_CHANGES])
        more = f"\n  and {len(changes) - _MOST_CHANGES} more" if len(changes) > _MOST_CHANGES else ""
        raise WorkError(
            f"{out}: {state}, and since it began this changed:\n{shown}{more}\n"
            "undo the change, choose another `out=`, or remove the folder to build anew"
        )
    return manifest


def save_plan(plan: dict[str, Any], *, work: Path) -> None:
    write_durably(work / PLAN_NAME, json.dumps(plan, indent=1, sort_keys=True).encode())


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
