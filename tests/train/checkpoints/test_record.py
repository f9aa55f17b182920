"""A completion mark of anybody's is a CheckpointError or one that readers can rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streaming_rwkv.model.marked_files import FORMAT, CheckpointError
from streaming_rwkv.train.checkpoints.local import newest_checkpoint
from streaming_rwkv.train.checkpoints.record import parse_mark, read_mark, step_name, step_of_name

RECORD = {"bytes": 1, "sha256": "0" * 64}


def mark(**changes: Any) -> bytes:
    whole = {"format": FORMAT, "step": 3, "run": {"batch_packs": 1}, "files": {"a": RECORD}} | changes
    return json.dumps({name: value for name, value in whole.items() if value != "missing"}).encode()


def test_a_whole_mark_is_returned_as_it_was_written() -> None:
    assert parse_mark(mark(tokens=5), where="here") == json.loads(mark(tokens=5))


@pytest.mark.parametrize(
    "changes",
    [
        *({name: "missing"} for name in ("step", "run", "files")),
        *({"files": files} for files in (None, [], {}, "a", {"a": None}, {"a": {}}, {"a": {"bytes": 1}})),
        *({"files": {name: RECORD}} for name in ("", ".", "..", "../a", "/etc/passwd", "a\0", "a\\b", "é" * 200)),
        {"files": {"a": RECORD | {"sha256": "../x"}}},
        {"files": {"a": RECORD | {"bytes": -1}}},
        *({"step": step} for step in ("x", [], None, -1, 1 << 70)),
        {"run": []},
        {"run": None},
        {"stranger": 1},
        {"consumed": {"web": "x"}},
    ],
)
def test_a_mark_with_a_wrong_field_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^here: "):
        parse_mark(mark(**changes), where="here")


@pytest.mark.parametrize(
    "content", [b"[]", b"\xff", b"[" * 100_000, mark(step=5).replace(b"5", b"1e999"), b'{"a": "\\ud800"}']
)
def test_what_is_no_mark_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^here: "):
        parse_mark(content, where="here")


def test_a_mark_that_never_ends_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "complete.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        read_mark(tmp_path)


def test_the_checkpoint_before_one_with_a_bad_mark_is_used(tmp_path: Path) -> None:
    for step, content in ((1, mark(step=1)), (2, mark(step=2, files="missing")), (3, mark(step=3))):
        folder = tmp_path / f"step-{step:08}"
        folder.mkdir()
        (folder / "complete.json").write_bytes(content)
        if step == 3:
            (folder / "a").symlink_to("/dev/zero")
        else:
            (folder / "a").write_bytes(b"x")
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1


@pytest.mark.parametrize(
    "name", ["step-1", "step-00000001.tmp", ".step-00000001.tmp", "step-000000001", "step-１２３４５６７８"]
)
def test_only_the_name_of_a_step_is_a_checkpoints_name(name: str) -> None:
    assert step_of_name(step_name(12)) == 12
    assert step_of_name(name) is None
