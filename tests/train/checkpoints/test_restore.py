"""A checkpoint is found in one way by training and by the programs that read weights, and compared with its run."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest

from streaming_rwkv.model.marked_files import FORMAT, CheckpointError, MarkedFile
from streaming_rwkv.train.checkpoints.record import Checkpoint, Progress, mark_content, parse_mark
from streaming_rwkv.train.checkpoints.restore import (
    _fetch_logs,
    check_same_run,
    local_checkpoint,
    mark_at,
    node_checkpoint,
)
from tests.rights import without_rights

RUN = {"data": "8d1f", "batch_packs": 16, "order": {"seed": 17}}


def progress(step: int) -> Progress:
    return Progress(step=step, tokens=0, samples=0, seconds=0, consumed={})


def write(run: Path, step: int, *, marked_step: int | None = None) -> Path:
    """A complete checkpoint of one file, whose content does not matter here."""
    folder = run / "checkpoints" / f"step-{step:08}"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(b"index")
    files = {".metadata": MarkedFile(bytes=5, sha256=hashlib.sha256(b"index").hexdigest())}
    content = mark_content(run={"batch_packs": 1}, progress=progress(marked_step or step), files=files)
    (folder / "complete.json").write_bytes(content)
    return folder


def test_the_folder_of_a_run_is_read_as_its_newest_complete_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 10)
    (write(tmp_path, 300) / ".metadata").write_bytes(b"cut")
    newest = write(tmp_path, 200)
    write(tmp_path, 400, marked_step=4)  # copied from another step
    (tmp_path / "checkpoints" / ".step-00000500.tmp").mkdir()
    with caplog.at_level(logging.WARNING), local_checkpoint(tmp_path) as path:
        assert path == newest
    assert "step-00000400: its mark is that of step 4" in caplog.text
    assert "step-00000300: .metadata has 3 bytes instead of 5" in caplog.text
    assert node_checkpoint(str(tmp_path), tmp_path / "unused") == newest


def test_a_run_without_a_finished_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no finished checkpoint yet"), local_checkpoint(tmp_path):
        pass


def test_a_run_whose_checkpoints_cannot_be_read_is_not_called_new(public_folder: Path) -> None:
    checkpoints = public_folder / "checkpoints"
    checkpoints.mkdir(mode=0o300)
    checkpoints.chmod(0o311)
    with pytest.raises(CheckpointError) as caught, without_rights(), local_checkpoint(public_folder):
        pass
    assert str(caught.value) == f"{checkpoints}: cannot be read (Permission denied); check its permissions"


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": "streaming-rwkv-checkpoint/2", "files": {}}'])
def test_a_damaged_mark_has_a_remedy(content: bytes, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 3)
    (checkpoint / "complete.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"; copy the checkpoint again from its source, or use another$"):
        mark_at(checkpoint)


def test_a_run_with_nothing_but_damage_is_refused(tmp_path: Path) -> None:
    (write(tmp_path, 3) / "complete.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint here is whole"), local_checkpoint(tmp_path):
        pass


def test_a_named_checkpoint_is_read_itself(tmp_path: Path) -> None:
    older = write(tmp_path, 10)
    write(tmp_path, 20)
    with local_checkpoint(older) as path:
        assert path == older


def checkpoint_of(run: dict[str, Any], *, replacing: tuple[str, str] = ("", "")) -> Checkpoint:
    files = {"a": MarkedFile(bytes=1, sha256="0" * 64)}
    content = mark_content(run=run, progress=progress(5), files=files).decode().replace(*replacing)
    return Checkpoint(path=Path("runs/a/checkpoints/step-00000005"), mark=parse_mark(content.encode(), where="a"))


def test_the_same_run_resumes() -> None:
    check_same_run(checkpoint_of(RUN), dict(RUN), allow=frozenset())


def test_every_setting_that_differs_is_named_with_both_values() -> None:
    now = {"data": "77aa", "batch_packs": 16, "order": {"seed": 18}, "optimizer": {"lr": 1}}
    with pytest.raises(CheckpointError) as caught:
        check_same_run(checkpoint_of(RUN), now, allow=frozenset())
    assert str(caught.value).splitlines()[1:] == [
        '  data: the checkpoint has "8d1f", this run "77aa"',
        '  optimizer: the checkpoint has null, this run {"lr": 1}',
        '  order: the checkpoint has {"seed": 17}, this run {"seed": 18}',
        "Give the run another `save_folder`, set the value back, or, if the change is meant, say "
        "checkpoint.allow_changed=[data,optimizer,order]",
    ]


def test_a_change_that_is_meant_can_be_allowed_by_name() -> None:
    now = RUN | {"data": "77aa", "batch_packs": 32}
    check_same_run(checkpoint_of(RUN), now, allow=frozenset({"data", "batch_packs"}))
    with pytest.raises(CheckpointError, match="batch_packs: the checkpoint has 16, this run 32"):
        check_same_run(checkpoint_of(RUN), now, allow=frozenset({"data"}))


def test_a_checkpoint_of_an_earlier_data_format_is_refused_with_the_remedy() -> None:
    checkpoint = checkpoint_of(RUN, replacing=(FORMAT, "streaming-rwkv-checkpoint/1"))
    with pytest.raises(CheckpointError) as caught:
        check_same_run(checkpoint, RUN, allow=frozenset())
    assert str(caught.value) == (
        "runs/a/checkpoints/step-00000005: made with a data set of the format streaming-rwkv/1, which can no longer be "
        "read; rebuild it with `streaming-rwkv prepare RECIPE`, and start a run from these weights in another "
        "`save_folder` (`model.init_from: runs/a/checkpoints/step-00000005`)"
    )


class Objects:
    """A store of which every object has its name as content; S3 has objects below objects, file systems have not."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def list(self, prefix: str) -> dict[str, int]:
        return {name: len(name) for name in self.names if name.startswith(prefix)}

    def get_file(self, name: str, path: Path, *, most: int) -> None:
        path.write_text(name)


def test_objects_that_stand_for_folders_are_no_logs(tmp_path: Path) -> None:
    store = Objects(
        "tokenizer", "tokenizer/", "tokenizer/tokenizer.json", "tokenizer/tokenizer.json/x", "tokenizer//y",
        "tensorboard/", "tensorboard/a/", "tensorboard/../../x", "metrics.jsonl", "metrics.jsonl/x", "metrics.jsonl.b",
    )  # fmt: skip
    _fetch_logs(store, tmp_path, ["metrics.jsonl", "tokenizer", "tensorboard"])  # type: ignore[arg-type]
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"metrics.jsonl", "tokenizer/tokenizer.json"}
