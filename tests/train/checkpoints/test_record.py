"""Every completion mark is either refused with a CheckpointError or can be relied on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streaming_rwkv.model.marked_files import FORMAT, CheckpointError, MarkedFile
from streaming_rwkv.train.checkpoints.local import newest_checkpoint
from streaming_rwkv.train.checkpoints.record import (
    Progress,
    mark_content,
    parse_mark,
    read_mark,
    step_name,
    step_of_name,
)

RECORD = {"bytes": 1, "sha256": "0" * 64}


def mark(**changes: Any) -> bytes:
    counts = {"step": 3, "tokens": 5, "samples": 2, "seconds": 0.5, "consumed": {"web/1-256": 5.0}}
    complete = {"format": FORMAT, **counts, "run": {"batch_packs": 1}, "files": {"a": RECORD}} | changes
    return json.dumps({name: value for name, value in complete.items() if value != "missing"}).encode()


def test_a_complete_mark_has_typed_fields() -> None:
    found = parse_mark(mark(), where="here")
    assert (found.step, found.tokens, found.consumed) == (3, 5, {"web/1-256": 5.0})
    assert found.files == {"a": MarkedFile(bytes=1, sha256="0" * 64)}
    assert found.run.settings() == {"batch_packs": 1}


def test_a_written_mark_is_read_again() -> None:
    progress = Progress(step=3, tokens=5, samples=2, slots=4, seconds=0.5, steps_skipped=1, consumed={"web": 5})
    files = {"a": MarkedFile(bytes=1, sha256="0" * 64)}
    found = parse_mark(mark_content(run={"data": "8d1f"}, progress=progress, files=files), where="here")
    assert {name: getattr(found, name) for name in Progress.model_fields} == progress.model_dump()
    assert (found.run.settings(), found.files) == ({"data": "8d1f"}, files)


def test_slots_are_counted_from_steps_where_a_mark_has_none() -> None:
    assert parse_mark(mark(run={"batch_packs": 4}), where="here").slots_used == 12  # 3 steps of 4 packs
    assert parse_mark(mark(run={"batch_packs": 4}, slots=None), where="here").slots_used == 12
    assert parse_mark(mark(run={"batch_packs": 4}, slots=10), where="here").slots_used == 10


@pytest.mark.parametrize(
    "changes",
    [
        *({name: "missing"} for name in ("step", "tokens", "samples", "seconds", "consumed", "run", "files")),
        *({"files": files} for files in (None, [], {}, "a", {"a": None}, {"a": {}}, {"a": {"bytes": 1}})),
        *({"files": {name: RECORD}} for name in ("", ".", "..", "../a", "/etc/passwd", "a\0", "a\\b", "é" * 200)),
        {"files": {"a": RECORD | {"sha256": "../x"}}},
        {"files": {"a": RECORD | {"bytes": -1}}},
        *({"step": step} for step in ("x", [], None, -1, 1 << 70)),
        {"run": []},
        {"run": None},
        {"run": {}},  # neither `slots` nor the number of packs in a step
        {"run": {"batch_packs": None}, "slots": None},
        {"run": {"mixture": {}, "batch_packs": 1}},
        {"slots": -1},
        {"tokens": 1.5},
        {"seconds": -1},
        {"steps_skipped": "x"},
        {"unknown": 1},
        {"consumed": {"web": "x"}},
    ],
)
def test_a_mark_with_a_wrong_field_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^here: "):
        parse_mark(mark(**changes), where="here")


@pytest.mark.parametrize(
    "content", [b"[]", b"\xff", b"[" * 100_000, mark(step=5).replace(b"5", b"1e999"), b'{"a": "\\ud800"}']
)
def test_content_that_is_not_a_mark_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^here: "):
        parse_mark(content, where="here")


def test_a_mark_that_never_ends_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "complete.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        read_mark(tmp_path)


def test_the_checkpoint_before_one_with_a_bad_mark_is_used(tmp_path: Path) -> None:
    marks = [mark(step=1), mark(step=2, files="missing"), mark(step=3), mark(step=4, tokens="missing")]
    for step, content in enumerate(marks, start=1):
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
