"""Files and folders appear whole or not at all, and no two runs write to one folder."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming_rwkv import filesystem
from streaming_rwkv.config import UserError
from streaming_rwkv.filesystem import (
    append_to,
    atomic_file,
    atomic_folder,
    check_can_be_made,
    explained_writes,
    is_disk_full,
    is_temporary,
    lock_folder,
    make_folder,
    open_regular_file,
    read_regular_file,
    sole_writer,
    temporary_path,
    wait_for_lock,
    write_atomically,
)

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
            f"{folder}: this save folder cannot be made or written to ({reason}); fix that, or take another"
        )


@pytest.mark.parametrize(
    ("below", "reason"),
    [
        ("file", "Not a directory"),
        ("file/a/run", "Not a directory"),
        ("link/run", "No such file or directory"),
        ("/proc/run", "No such file or directory"),
        ("/dev/null/run", "Not a directory"),
    ],
)
def test_whether_a_folder_can_be_made_is_told_without_making_it(tmp_path: Path, below: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError) as caught:
        check_can_be_made(tmp_path / below, what="save folder", remedy="take another")
    assert str(caught.value) == (
        f"{tmp_path / below}: this save folder cannot be made or written to ({reason}); fix that, or take another"
    )
    for possible in (tmp_path, tmp_path / "a" / "b"):
        check_can_be_made(possible, what="save folder", remedy="take another")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_finding_out_whether_a_folder_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b", what="save folder", remedy="take another")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"or written to \(Permission denied\)"):
        make_folder(tmp_path, what="save folder", remedy="take another")


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"by process {holder.pid}"):
        lock_folder(tmp_path, what="save folder", remedy="take another")
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=250)
    lock_folder(tmp_path, what="save folder", remedy="take another").release()


writing = functools.partial(sole_writer, what="export", remedy="take another")


@pytest.mark.parametrize("is_folder", [True, False])
def test_an_output_has_one_writer_at_a_time(tmp_path: Path, is_folder: bool) -> None:
    output = tmp_path / "new" / "output"
    with writing(output, is_folder=is_folder):
        with pytest.raises(UserError) as caught, writing(output, is_folder=is_folder):
            pass
        with writing(tmp_path / "new" / "other", is_folder=is_folder):
            pass
    expected = f"{output}: this export is in use (by process {os.getpid()}); stop that run, or take another"
    assert str(caught.value) == expected
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
    with writing(output, is_folder=is_folder):
        pass


def test_a_lock_that_its_last_holder_removes_is_not_relied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hold_while_it_is_removed(lock: Path, place: Path, *, what: str, remedy: str) -> int:
        monkeypatch.undo()
        descriptor = filesystem._hold(lock, place, what=what, remedy=remedy)
        lock.unlink()
        return descriptor

    monkeypatch.setattr(filesystem, "_hold", hold_while_it_is_removed)
    with writing(tmp_path), pytest.raises(UserError, match="in use"), writing(tmp_path):
        pass


def test_a_shorter_process_number_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("9" * 50)
    lock = lock_folder(tmp_path, what="save folder", remedy="take another")
    assert (tmp_path / ".lock").read_text() == str(os.getpid())
    lock.release()


@contextlib.contextmanager
def without_space() -> Iterator[None]:
    """Let no file grow, as on a full disk; `File too large` is the error, not `No space left on device`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_of_the_output_and_not_of_its_lock(tmp_path: Path) -> None:
    def write() -> None:
        with writing(tmp_path / "output"), explained_writes(tmp_path / "output"):
            write_atomically(tmp_path / "output" / "file", b"content")

    with without_space():
        with pytest.raises(UserError, match=r"output: cannot be written \(File too large\)"):
            write()
        lock = lock_folder(tmp_path / "run", what="save folder", remedy="take another")
        with pytest.raises(UserError, match=r"is in use \(by process unknown\)"):
            lock_folder(tmp_path / "run", what="save folder", remedy="take another")
        lock.release()
    assert list((tmp_path / "output").iterdir()) == []


def test_a_disk_without_space_needs_space() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError) as caught, explained_writes(Path("a")):
        raise full
    assert str(caught.value) == "a: cannot be written (No space left on device); make space, or write to another place"


def test_a_file_system_without_locks_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)  # no such file system can be mounted here
    lock_folder(tmp_path, what="save folder", remedy="take another").release()
    assert f"{tmp_path}: the file system has no locks (flock)" in caplog.text


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def fail() -> None:
        with atomic_file(target) as temporary:
            temporary.write_bytes(b"half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_write_takes_over_what_a_killed_one_left(tmp_path: Path) -> None:
    target = tmp_path / "file"
    temporary_path(target).write_bytes(b"left by a killed process")
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with atomic_file(target, concurrent=True) as first, atomic_file(target, concurrent=True) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        assert is_temporary(first)
        assert first != second
    assert target.read_bytes() == b"first"  # renamed last
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def fail() -> None:
        with atomic_folder(folder) as temporary:
            (temporary / "file").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    with atomic_folder(folder) as temporary:  # an empty one is replaced
        (temporary / "file").touch()
        assert list(folder.iterdir()) == []
    assert list(folder.iterdir()) == [folder / "file"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_another_process_has_written_meanwhile_stays(tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def write_twice() -> None:
        with atomic_folder(folder) as temporary:
            (temporary / "file").write_text("second")
            folder.mkdir()
            (folder / "file").write_text("first")

    with pytest.raises(UserError, match="folder: another process has written to it meanwhile; write to another place"):
        write_twice()
    assert (folder / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "folder"):
        pass
    (tmp_path / "other").mkdir()
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_lock_that_is_not_free_in_time_gives_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with wait_for_lock(tmp_path, timeout_seconds=60):
        assert caplog.text == ""
        with wait_for_lock(tmp_path, timeout_seconds=0):
            assert f"{tmp_path}: another process has held this folder" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", ["the final name", "the temporary name"])
def test_a_write_does_not_follow_a_link(tmp_path: Path, at: str) -> None:
    other, target = tmp_path / "other", tmp_path / "folder" / "file"
    other.write_bytes(b"of another program")
    target.parent.mkdir()
    (target if at == "the final name" else temporary_path(target)).symlink_to(other)
    write_atomically(target, b"new")
    assert other.read_bytes() == b"of another program"
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]
    assert not target.is_symlink()


def test_a_lock_that_is_a_link_is_refused_and_not_followed(tmp_path: Path) -> None:
    other, folder = tmp_path / "other", tmp_path / "run"
    other.write_bytes(b"of another program")
    folder.mkdir()
    (folder / ".lock").symlink_to(other)
    with pytest.raises(UserError) as caught:
        lock_folder(folder, what="save folder", remedy="take another")
    assert str(caught.value) == (
        f"{folder}/.lock: found a symbolic link, expected the regular file of a lock; remove it, or take another"
    )
    assert other.read_bytes() == b"of another program"


def test_a_lock_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock: found a named pipe, expected the regular file of a lock; remove it"):
        lock_folder(tmp_path, what="save folder", remedy="take another")


def test_a_regular_file_of_the_allowed_size_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(file)
    assert read_regular_file(file, most=5) == b"12345"
    assert read_regular_file(tmp_path / "link", most=5) == b"12345"
    with pytest.raises(UserError) as caught:
        read_regular_file(file, most=4)
    assert str(caught.value) == f"{file}: found 5 bytes, expected a regular file of at most 4 bytes; restore it"
    with pytest.raises(FileNotFoundError):
        read_regular_file(tmp_path / "none", most=4)


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a device or socket"])
def test_only_a_regular_file_is_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    match kind:
        case "a folder":
            path.mkdir()
        case "a named pipe":
            os.mkfifo(path)
        case _:
            path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"file: found {kind}, expected a regular file of at most 9 bytes"):
        open_regular_file(path, most=9)


def test_bytes_are_added_at_the_end_of_a_file(tmp_path: Path) -> None:
    for line in (b"one\n", b"two\n"):
        with append_to(tmp_path / "lines") as file:
            file.write(line)
    assert (tmp_path / "lines").read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("kind", ["a symbolic link", "a named pipe", "a folder", "a device or socket"])
def test_nothing_is_added_to_what_is_no_regular_file(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "lines", tmp_path / "other"
    other.write_bytes(b"of another program")
    match kind:
        case "a symbolic link":
            path.symlink_to(other)
        case "a named pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
        case _:
            path = Path("/dev/full")
    with pytest.raises(UserError) as caught, append_to(path):
        pass
    assert str(caught.value) == f"{path}: found {kind}, expected a regular file to append to; remove it"
    assert other.read_bytes() == b"of another program"


def test_a_pipe_with_a_reader_is_no_file_to_append_to_either(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lines")
    reader = os.open(tmp_path / "lines", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(UserError, match="found a named pipe"), append_to(tmp_path / "lines"):
        pass
    os.close(reader)


def test_a_link_is_not_read_where_links_are_not_expected(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_regular_file(tmp_path / "file", most=9, follow=False) == b"x"
    with pytest.raises(UserError, match=r"link: found a symbolic link, expected a regular file of at most 9 bytes"):
        read_regular_file(tmp_path / "link", most=9, follow=False)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.ENOSPC, ""), True), (OSError(errno.EFBIG, ""), True), (OSError(errno.EIO, ""), False)],
)
def test_a_full_disk_is_told_from_other_faults(error: OSError, expected: bool) -> None:
    assert is_disk_full(error) is expected
