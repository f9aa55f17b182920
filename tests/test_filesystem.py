"""Folders are made or refused with the reason, and no two runs write to one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streaming_rwkv.config import UserError
from streaming_rwkv.filesystem import lock_folder, make_folder

HOLD = """
import sys, time
from pathlib import Path
from streaming_rwkv.filesystem import lock_folder
lock = lock_folder(Path(sys.argv[1]), what="save folder", remedy="take another")
print("held", flush=True)
time.sleep(60)
"""


def test_a_held_folder_is_refused_with_its_holder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    lock = lock_folder(folder, what="save folder", remedy="take another")
    with pytest.raises(UserError) as caught:
        lock_folder(folder, what="save folder", remedy="take another")
    assert str(caught.value) == (
        f"{folder}: this save folder is in use (by process {os.getpid()}); stop that run, or take another"
    )
    lock.release()
    lock.release()
    lock_folder(folder, what="save folder", remedy="take another").release()


@pytest.mark.parametrize(
    ("below", "reason"),
    [("file", "File exists"), ("file/run", "Not a directory"), ("/proc/run", "No such file or directory")],
)
def test_a_folder_that_cannot_be_made_is_refused_with_the_reason(tmp_path: Path, below: str, reason: str) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / below
    for claim in (make_folder, lock_folder):
        with pytest.raises(UserError) as caught:
            claim(folder, what="save folder", remedy="take another")
        assert str(caught.value) == (
            f"{folder}: this save folder cannot be made, or not written to ({reason}); mend that, or take another"
        )


def test_finding_out_whether_a_folder_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b", what="save folder", remedy="take another")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"not written to \(Permission denied\)"):
        make_folder(tmp_path, what="save folder", remedy="take another")


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"by process {holder.pid}"):
        lock_folder(tmp_path, what="save folder", remedy="take another")
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=10)
    lock_folder(tmp_path, what="save folder", remedy="take another").release()


def test_a_shorter_process_number_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("9" * 50)
    lock = lock_folder(tmp_path, what="save folder", remedy="take another")
    assert (tmp_path / ".lock").read_text() == str(os.getpid())
    lock.release()


def test_a_file_system_without_locks_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)  # no such file system can be mounted here
    lock_folder(tmp_path, what="save folder", remedy="take another").release()
    assert f"{tmp_path}: the file system has no locks (flock)" in caplog.text
