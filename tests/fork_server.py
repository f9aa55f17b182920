"""Python programs started in milliseconds: a server imports torch, Composer and Streaming once and forks per program.

Importing them takes 13 s of processor time a process, for the launcher and for each rank: more than a small run itself.
`ForkServer.popen` takes what `subprocess.Popen` takes, for commands of this interpreter:

    with ForkServer() as server:
        process = server.popen([composer, "-n", "2", "train.py", "yamls/tiny_cpu.yaml"], cwd=root, stdout=log)
        process.wait(timeout=300)

A forked program behaves as a started one: its own arguments, environment, folder, streams and session,
`sitecustomize` from PYTHONPATH, the signal handlers that Composer's import sets, and children of its own: what a
launcher starts by `subprocess.Popen([sys.executable, …])` is forked from that launcher. There are two differences:
/proc shows the command line and the environment of the server, and libraries have read their environment variables
when the server started. Tests of starting up and of the launcher itself use real processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).parents[1]
_STREAMS = 3
_MOST_BYTES = 1 << 20


class ForkServer:
    """One server process and the programs it forks; leaving the context ends the server, not the programs."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fork-server-")
        self._address = str(Path(self._folder.name) / "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self._address)
        listener.listen(64)
        # One thread each, as every test of whole runs has it: libgomp reads the number when it is loaded.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(listener.fileno())],
            cwd=ROOT,
            env=environment,
            pass_fds=[listener.fileno()],
        )
        listener.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def popen(
        self,
        command: Sequence[str | Path],
        *,
        cwd: str | Path = ROOT,
        env: Mapping[str, str] | None = None,
        stdout: BinaryIO | int | None = None,
        stderr: BinaryIO | int | None = None,
    ) -> ForkedProgram:
        """Start `command` in a session of its own: this interpreter with a script or `-m module`, or a script that is
        installed beside this interpreter."""
        request = {
            "command": [str(word) for word in command],
            "cwd": str(cwd),
            "env": dict(os.environ if env is None else env),
        }
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(self._address)
        out = _descriptor(stdout, 1)
        error = out if stderr == subprocess.STDOUT else _descriptor(stderr, 2)
        socket.send_fds(connection, [len(content := json.dumps(request).encode()).to_bytes(8, "little")], [out, error])
        connection.sendall(content)
        return ForkedProgram(connection, request["command"])

    def run(
        self, command: Sequence[str | Path], *, timeout: float, check: bool = False, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """`subprocess.run(..., capture_output=True, text=True)`."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
            process = self.popen(command, stdout=out, stderr=error, **options)
            try:
                status = process.wait(timeout=timeout)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
            texts = []
            for stream in (out, error):
                stream.seek(0)
                texts.append(stream.read().decode(errors="replace"))
        if check and status:
            raise subprocess.CalledProcessError(status, list(map(str, command)), *texts)
        return subprocess.CompletedProcess(list(map(str, command)), status, *texts)


class ForkedProgram:
    """`subprocess.Popen` for a child of the server: `pid`, `poll`, `wait`, `returncode` and signals."""

    def __init__(self, connection: socket.socket, command: list[str]) -> None:
        self.args = command
        self.returncode: int | None = None
        self._connection = connection
        self.pid = int.from_bytes(_receive(connection, 8), "little")

    def poll(self) -> int | None:
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int.from_bytes(_receive(self._connection, 8), "little", signed=True)
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from error
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _descriptor(stream: BinaryIO | int | None, default: int) -> int:
    if stream is None:
        return default
    if stream == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_RDWR)
    return stream if isinstance(stream, int) else stream.fileno()


def _receive(connection: socket.socket, size: int) -> bytes:
    """The next `size` bytes, which are sent at once."""
    content = connection.recv(size, socket.MSG_WAITALL)
    if len(content) < size:
        raise ConnectionError("the fork server has ended")
    return content


class _ForkingPopen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` that forks this process where the command is this interpreter with a script or module."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *rest: Any) -> None:
        words = [os.fsdecode(word) for word in args] if not isinstance(args, (str, bytes, os.PathLike)) else []
        if _program_of(words) is None:
            super()._execute_child(args, executable, preexec_fn, *rest)  # type: ignore[misc]
            return
        _, _, cwd, env, _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[:13]
        self.pid = os.fork()
        if self.pid == 0:
            streams = [p2cread, c2pwrite, errwrite]
            _become(words, cwd or os.getcwd(), dict(os.environ if env is None else env), streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def _program_of(words: list[str]) -> list[str] | None:
    """Arguments of the interpreter, for a command that it can run by a fork: a script, or `-m module`."""
    if not words:
        return None
    beside = Path(sys.executable).parent
    if Path(words[0]).parent == beside and Path(words[0]).name in ("composer", "torchrun"):
        return words
    arguments = words[1:]
    while arguments and arguments[0] == "-u":
        arguments = arguments[1:]
    if words[0] != sys.executable or not arguments or (arguments[0].startswith("-") and arguments[0] != "-m"):
        return None
    return arguments


def _become(words: list[str], cwd: str, env: dict[str, str], streams: Sequence[int]) -> None:
    """Run `words` in this process, just forked, and end it."""
    status = 1
    try:
        program = _program_of(words)
        assert program is not None, words
        # Copies above the standard three first: a source may be the target of another.
        copies = [
            fcntl.fcntl(target if source == -1 else source, fcntl.F_DUPFD, _STREAMS)
            for target, source in enumerate(streams)
        ]
        for target, copy in enumerate(copies):
            os.dup2(copy, target)
        os.closerange(_STREAMS, 1024)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        for name in ("stdout", "stderr"):
            encoding, _, errors = env.get("PYTHONIOENCODING", "").partition(":")
            descriptor = 1 if name == "stdout" else 2
            stream = open(  # noqa: SIM115 - for the process's life
                descriptor, "w", encoding=encoding or "utf-8", errors=errors or None, buffering=1, closefd=False
            )
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        for folder in filter(None, env.get("PYTHONPATH", "").split(os.pathsep)):
            sys.path.insert(0, folder)
            if (hook := Path(folder) / "sitecustomize.py").is_file():
                runpy.run_path(str(hook))
        subprocess.Popen = _ForkingPopen  # type: ignore[misc]
        status = _run(program)
    except BaseException:  # noqa: BLE001 - what the interpreter does with it
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run(program: list[str]) -> int:
    """The exit status of a script or of `-m module`, as the interpreter would give it."""
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            sys.path.insert(0, str(Path(program[0]).resolve().parent))
            runpy.run_path(program[0], run_name="__main__")
        return 0
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 128 + signal.SIGINT
    finally:
        threading._shutdown()  # type: ignore[attr-defined]


def _serve(listener: socket.socket) -> None:
    """Fork a program for each connection and report its end, until this process is killed."""
    gc.disable()
    import streaming  # noqa: F401

    import streaming_rwkv.inference.evaluate
    import streaming_rwkv.inference.export
    import streaming_rwkv.inference.generate
    import streaming_rwkv.train.dry_run
    import streaming_rwkv.train.fit  # noqa: F401

    # No program's collections go through what was imported; they would copy most of this process's memory.
    gc.freeze()
    gc.enable()
    while True:
        connection, _ = listener.accept()
        head, descriptors, _, _ = socket.recv_fds(connection, 8, 2)
        request = json.loads(_receive(connection, int.from_bytes(head, "little")))
        keeper = os.fork()
        if keeper:  # it reports the end of the program, and the server is free for the next
            connection.close()
            for descriptor in descriptors:
                os.close(descriptor)
            os.waitpid(keeper, 0)
            continue
        if os.fork():
            os._exit(0)
        listener.close()
        ready, is_ready = os.pipe()
        program = os.fork()
        if program == 0:
            os.setsid()
            os.write(is_ready, b"1")
            connection.close()
            null = os.open(os.devnull, os.O_RDONLY)
            _become(request["command"], request["cwd"], request["env"], [null, *descriptors])
        os.read(ready, 1)  # it has its own session by then
        connection.sendall(program.to_bytes(8, "little"))
        for descriptor in descriptors:
            os.close(descriptor)
        _, code = os.waitpid(program, 0)
        connection.sendall(os.waitstatus_to_exitcode(code).to_bytes(8, "little", signed=True))
        os._exit(0)


if __name__ == "__main__":
    # The server ends with the tests that use it, however they end.
    from streaming_rwkv.processes import die_with_parent

    die_with_parent()
    _serve(socket.socket(fileno=int(sys.argv[1])))
