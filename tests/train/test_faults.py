"""Faults of the machine become one line with a remedy."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from streaming_rwkv.config import UserError
from streaming_rwkv.console import OutputError
from streaming_rwkv.data import streaming_compat
from streaming_rwkv.train.__main__ import main
from streaming_rwkv.train.callbacks.json_lines import JSONLines, forget_lines_after
from streaming_rwkv.train.faults import explained_faults


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/a"), "/x/a: no space left on the disk"),
        (OSError(errno.EROFS, "Read-only file system", "/x/a"), "/x/a: cannot be read or written any more"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/runs/a/metrics.jsonl"), "gone while the run was using it"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "/runs/a/.x.tmp", None, "/runs/a/x"),
            "^/runs/a/x: another kind of file than a run writes there",
        ),
        (OSError(errno.EMFILE, "Too many open files"), r"ulimit -n"),
        (
            RuntimeError("can't start new thread"),
            "limit of processes and threads .*, or set `data.workers` .* lower;",
        ),
        (
            MemoryError(),
            "^no memory is left, of .*; give the job more, or set .*`microbatch_packs`.* lower; the same",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "loader process 7 was ended by signal",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "loader process 7, 8 was ended"),
        (
            RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:9"),
            "another rank of this run does not answer",
        ),
        (OutputError(OSError(errno.ENOSPC, "No space left on device")), "^standard output: cannot be written"),
        (RuntimeError("unexpected pos 704 vs 598"), "a checkpoint was not written whole"),
        (CheckpointException("write", {0: (OSError(errno.ENOSPC, "full"), None)}), "no space left on the disk"),  # type: ignore[dict-item]
    ],
)
def test_a_fault_of_the_machine_is_reported_in_one_line(error: BaseException, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught, explained_faults(Path("/runs/a")):
        raise error
    assert "\n" not in str(caught.value)


def test_another_error_is_raised_unchanged() -> None:
    for error in (RuntimeError("shape"), FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere")):
        with pytest.raises(type(error)), explained_faults(Path("/runs/a")):
            raise error


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
def test_shared_memory_that_does_not_fit_is_refused_before_it_is_used() -> None:
    with (
        pytest.raises(UserError, match=r"^/dev/shm: no room for the shared memory"),
        streaming_compat._recorded_shared_memory(),
    ):
        streaming_compat.prefix.SharedMemory(name=f"streaming-rwkv-test-{os.getpid()}", create=True, size=1 << 50)
    assert not Path(f"/dev/shm/streaming-rwkv-test-{os.getpid()}").exists()


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    lines = JSONLines(tmp_path / "metrics.jsonl")
    lines.log_metrics({"loss": float("nan"), "norm": float("inf"), "lr": 0.5})
    lines.flush(3)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "loss": null, "norm": null, "lr": 0.5}\n'


def test_damaged_lines_of_metrics_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step}).encode() for step in (1, 2, 3)]
    path.write_bytes(b"\n".join([whole[0], b"\xff\xfe" + b"\0" * 300, b"[1]", b'{"step": NaN}', *whole[1:], b""]))
    forget_lines_after(path, 2)
    assert path.read_bytes() == whole[0] + b"\n" + whole[1] + b"\n"


@pytest.mark.parametrize("kind", ["a symbolic link", "a named pipe"])
def test_metrics_and_samples_are_not_written_through_links_and_pipes(kind: str, tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    other.write_text('{"step": 9}\n')
    path.symlink_to(other) if kind == "a symbolic link" else os.mkfifo(path)
    lines = JSONLines(path)
    lines.log_metrics({"loss": 1.0})
    for write in (lambda: lines.flush(3), lambda: lines.rewind(2)):
        with pytest.raises(UserError, match=rf"metrics\.jsonl: found {kind}, expected a regular file"):
            write()
    assert other.read_text() == '{"step": 9}\n'


def test_an_interrupted_checkpoint_is_an_interruption() -> None:
    failures = {0: _wrap_exception(KeyboardInterrupt())}
    with pytest.raises(KeyboardInterrupt), explained_faults(Path("/runs/a")):
        raise CheckpointException("write", failures)


class NoMemory(MetaPathFinder):
    """Fails to import a module as the dynamic linker does when the address space is limited."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "streaming_rwkv.train.dry_run":
            raise ImportError("libtorch.so: failed to map segment from shared object")


def test_an_import_without_memory_ends_a_run_with_one_line(
    write_data_set: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_data_set(tmp_path / "data", {("web", 1, 32): 4})
    monkeypatch.delitem(sys.modules, "streaming_rwkv.train.dry_run", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoMemory(), *sys.meta_path])
    assert main(["yamls/tiny_cpu.yaml", f"data.path={data}", f"save_folder={tmp_path}/run"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: libtorch.so: failed to map segment from shared object: no memory is left, of ")


def test_an_error_of_a_thread_is_reported_once_by_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    def ended(error: Exception) -> None:
        thread = threading.Thread(target=lambda: (_ for _ in ()).throw(error))
        thread.start()
        thread.join()

    with explained_faults(Path("/runs/a")):
        ended(FileNotFoundError(errno.ENOENT, "No such file", "/runs/a/tensorboard/events"))
        assert capsys.readouterr().err == ""
        ended(ValueError("a fault of the program"))
        assert "ValueError: a fault of the program" in capsys.readouterr().err
