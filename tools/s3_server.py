"""A real S3 server on loopback: SeaweedFS, one process, with credentials, that can be killed and started again.

`python -m tools.s3_server` (or `make s3`) starts one for hand trials; the fixture `s3_server` is one for all tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.ports import free_ports

ACCESS_KEY = "test-access-key"
PUBLIC_BUCKET = "public"
"""A bucket that anybody may list and read, without credentials, once it is made."""
SECRET_KEY = "test-secret-key-that-no-log-may-show"
_SECONDS_TO_START = 60
_LIBC = ctypes.CDLL(None)  # not between fork and exec, where another thread's lock may never be released


@dataclass(kw_only=True)
class S3Server:
    """A SeaweedFS whose data outlive its process, like a machine that crashes and boots again."""

    folder: Path
    sockets: Path
    """A folder with a short path: a socket's has 107 bytes at most."""
    ports: dict[str, int] = field(default_factory=lambda: _free_ports(_PORTS))
    _process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3.port']}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that our programs, Streaming's and Composer's read."""
        return {
            "S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            # boto3's own clients (Streaming's, Composer's) then send no checksum trailers.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def start(self) -> None:
        """Start, and wait until it answers; at the same address as before.

        From the main thread: on Linux the server dies with the thread that started it.

        Raises:
            ChildProcessError: it ended at once.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        identities = self.folder / "identities.json"
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        readers = [f"{action}:{PUBLIC_BUCKET}" for action in ("Read", "List")]
        anybody = {"name": "anonymous", "actions": readers}
        owner = {"name": "tests", "credentials": credentials, "actions": actions}
        identities.write_text(json.dumps({"identities": [owner, anybody]}))
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("weed")),
                    f"-logdir={self.folder}",  # not the folder for temporary files of the machine
                    "server",
                    f"-dir={self.folder}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    "-master.volumeSizeLimitMB=64",
                    "-master.electionTimeout=1s",
                    "-volume.max=0",
                    "-volume.minFreeSpace=10MiB",
                    "-s3",
                    f"-s3.config={identities}",
                    f"-s3.localSocket={self.sockets}/s3.sock",
                    f"-filer.localSocket={self.sockets}/filer.sock",
                    "-s3.autoCreateBucket=false",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    *(f"-{name}={port}" for name, port in self.ports.items()),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        end = time.monotonic() + _SECONDS_TO_START
        while not self._answers():
            if self._process.poll() is not None:
                raise ChildProcessError(self.log()[-2000:])
            assert time.monotonic() < end, self.log()[-2000:]
            time.sleep(0.1)

    def create_bucket(self, name: str) -> None:
        with self.client() as client:
            there = client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
            with contextlib.suppress(*there):
                client.create_bucket(Bucket=name)

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """boto3's own, to look from the outside."""
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )
        with contextlib.closing(client):
            yield client

    def kill(self) -> None:
        """SIGKILL, as a crash would; what it holds stays on the disk."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def _answers(self) -> bool:
        """Return True if S3 answers and its master knows the volumes: an upload before that would wait."""
        master = f"http://127.0.0.1:{self.ports['master.port']}/dir/status"
        try:
            with urllib.request.urlopen(master, timeout=2) as answer:
                has_volumes = bool(json.load(answer)["Topology"]["DataCenters"])
            urllib.request.urlopen(self.endpoint, timeout=2).close()
        except urllib.error.HTTPError as error:  # S3 lists nothing without credentials
            error.close()
            return error.code == 403 and has_volumes
        except OSError:
            return False
        return has_volumes


# Each gRPC port would be port + 10000 by default, which may not exist.
_PORTS = tuple(f"{name}.port{grpc}" for name in ("master", "volume", "filer", "s3") for grpc in ("", ".grpc"))


def _free_ports(names: tuple[str, ...]) -> dict[str, int]:
    return dict(zip(names, free_ports(len(names)), strict=True))


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[S3Server]:
    """A server that keeps everything in `folder`."""
    with tempfile.TemporaryDirectory(prefix="s3-", dir="/tmp") as sockets:  # TMPDIR may be a long path
        server = S3Server(folder=folder, sockets=Path(sockets))
        try:
            try:
                server.start()
            except ChildProcessError:  # most likely somebody has taken one of its ports meanwhile
                server.ports = _free_ports(_PORTS)
                server.start()
            yield server
        finally:
            server.kill()


def main() -> None:
    """Run a server until Ctrl-C or SIGTERM; a bucket `trial` is there."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        if len(sys.argv) > 1:
            folder = Path(sys.argv[1])
        else:
            temporary = tempfile.TemporaryDirectory(prefix="s3-trial-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(temporary))
        server = stack.enter_context(running(folder))
        server.create_bucket("trial")
        for name, value in server.environment.items():
            print(f"export {name}={value}")
        print("# bucket: s3://trial   data:", folder, "  Ctrl-C stops the server", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
