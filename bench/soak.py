"""Prepare into S3 and train from it through a proxy that breaks things, kill client and server, and compare.

    python -m bench.soak --minutes 30

Everything is real but small: a SeaweedFS, the fault proxy of the tests before it, `prep` with `out=s3://…`, and then
the training loop of bench/kills.py with its data, its checkpoints and its logs in the bucket. At random moments the
client gets SIGKILL, all its processes, and every third time loses its disk; at others the server gets SIGKILL and
starts again some seconds later. A client that stops with an error is started again, as a person would do.

Each round is compared with an undisturbed one: every object of the data set, the packs of every step, and the final
weights, on this machine and in the bucket, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from bench.kills import log_of, make_corpus, steps_of, train
from prep.build import build
from streaming_rwkv.model.weights import read_state
from streaming_rwkv.processes import die_with_parent
from streaming_rwkv.shards import read_manifest
from streaming_rwkv.storage import open_store
from streaming_rwkv.train.checkpoints.restore import restore
from tests.fault_proxy import Fault, FaultProxy
from tools.s3_server import S3Server, running

BUCKET = "soak"
TIMEOUT_SECONDS = 60.0  # longer than the server is ever away
OBJECT = r"mds\.zstd|distcp|metadata|json"  # whose content has a checksum, other than a list's
# All of them pass: of a hundred requests some six break, and one in three hundred stops the run with an error.
FAULTS = [
    *(Fault(kind="status", status=status, chance=0.005) for status in (429, 500, 503)),
    *(Fault(kind=kind, chance=0.005) for kind in ("reset", "truncate", "lose answer", "reset upload")),
    *(Fault(kind=kind, method="GET", path=OBJECT, chance=0.01) for kind in ("flip", "shorten")),
    Fault(kind="flip upload", method="PUT", chance=0.01),
    *(Fault(kind=kind, chance=0.001) for kind in ("slow", "silent")),
    Fault(kind="status", status=403, chance=0.001),
]  # fmt: skip


@dataclass(kw_only=True)
class World:
    """Server and proxy, with counts of what was done to them and to the client."""

    server: S3Server
    proxy: FaultProxy
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    next_server_kill: float = float("inf")
    server_back: float = 0.0

    def tick(self) -> None:
        """Kill the server or start it again, if it is time."""
        now = time.monotonic()
        if self.server_back and now >= self.server_back:
            self.server.start()
            self.server_back = 0.0
            self.next_server_kill = time.monotonic() + self.rng.uniform(10, 60)
        elif not self.server_back and now >= self.next_server_kill:
            self.server.kill()
            self.counts["server killed"] += 1
            self.server_back = now + self.rng.uniform(0, 4)

    def calm(self) -> None:
        """End all faults, and start the server if it is down."""
        self.proxy.clear()
        if self.server_back:
            self.server.start()
            self.server_back = 0.0


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def start(work: Callable[[], object], output: Path) -> psutil.Process:
    """Run `work` in a process of its own, which exits with 0 if it completed."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            die_with_parent()
            tempfile.tempdir = None  # ours is not the clients'
            os.setpgid(0, 0)
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            work()
            status = 0
        except Exception as error:  # noqa: BLE001 - it stops; the log says why
            print(f"stopped: {type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    return psutil.Process(process)


def kill(process: psutil.Process) -> int:
    """Kill the client and all its workers; return their number once none is left."""
    processes = [process, *process.children(recursive=True)]
    for each in processes:
        each.kill()
    psutil.wait_procs(processes, timeout=30)
    return len(processes)


def train_there(data: str, folder: Path, log: Path, remote: str, cache_limit: int) -> None:
    folder.mkdir(exist_ok=True)
    train(data, folder, log=log, store=open_store(remote, timeout_seconds=TIMEOUT_SECONDS), cache_limit=cache_limit)


def do_to_the_end(
    world: World, name: str, work: Callable[[], object], disk: Path, output: Path, *, longest: float, ends: float
) -> None:
    """Start and kill a client, after `longest` seconds at most, until it has come to its end by itself.

    After the time `ends` nothing is done to it any more.
    """
    while True:
        client = start(work, output)
        world.counts[f"{name} started"] += 1
        deadline = time.monotonic() + world.rng.uniform(0.2, longest)
        status = None
        while time.monotonic() < deadline or time.monotonic() > ends:
            if time.monotonic() > ends:
                world.calm()
            else:
                world.tick()
            pid, code = os.waitpid(client.pid, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.01)
        if status == 0:
            return
        if status is None:
            world.counts[f"{name} processes killed"] += kill(client)
            world.counts[f"{name} killed"] += 1
        else:
            world.counts[f"{name} stopped with an error"] += 1
        if world.rng.random() < 1 / 3:
            shutil.rmtree(disk, ignore_errors=True)
            world.counts[f"{name} lost its disk"] += 1


def assert_same_weights(folder: Path, quiet: Path, *, step: int) -> None:
    name = f"checkpoints/step-{step:08d}"
    before, after = read_state(quiet / name), read_state(folder / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before), folder


def litter(root: Path) -> list[str]:
    """List files that clients left in their temporary folder, and shared memory that names one of their folders."""
    shared = [path for path in Path("/dev/shm").glob("*_locals") if os.access(path, os.R_OK)]
    ours = [path for path in shared if str(root).encode() in path.read_bytes()]
    names = [path.name for path in [*(root / "temporary").iterdir(), *ours]]
    return sorted(name for name in names if not name.startswith("weed."))  # the server's own logs


def assert_same_objects(location: str, data: Path) -> None:
    """Check that the data set in the bucket is the local one, object for object and byte for byte."""
    with closing(open_store(location)) as store:
        local = {
            path.relative_to(data).as_posix(): path
            for path in data.rglob("*")
            if path.is_file() and ".prep" not in path.parts
        }
        assert set(store.list()) == set(local), set(store.list()) ^ set(local)
        different = [name for name, path in local.items() if store.get_bytes(name, most=1 << 30) != path.read_bytes()]
        assert not different, different
        assert store.abort_unfinished() == 0


def assert_whole_in_bucket(remote: str, quiet: Path, empty: Path, *, step: int) -> None:
    """Check that an empty machine finds the final weights, and no unfinished files beside them."""
    empty.mkdir()
    with closing(open_store(remote)) as store:
        restore(store, empty)
        assert_same_weights(empty, quiet, step=step)
        leftovers = [name for name in store.list("checkpoints/") if "uploading" in name]
        assert not leftovers, leftovers
        assert store.abort_unfinished() == 0
    shutil.rmtree(empty)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        root = Path(temporary)
        (root / "temporary").mkdir()
        with (
            running(root / "s3") as server,
            FaultProxy(server.endpoint, seed=options.seed) as proxy,
            environment(
                server.environment
                | {
                    "S3_ENDPOINT_URL": proxy.url,
                    "TMPDIR": str(root / "temporary"),
                    "TOKENIZERS_PARALLELISM": "false",  # it warns of forks
                }
            ),
        ):
            server.create_bucket(BUCKET)
            world = World(server=server, proxy=proxy, rng=random.Random(options.seed))
            soak(world, root, seconds=60 * options.minutes)
    return 0


def soak(world: World, root: Path, *, seconds: float) -> None:
    config = make_corpus(root)
    build(config)
    data, output = Path(config.out), root / "output.txt"
    largest = max(s.raw_bytes + s.bytes for stream in read_manifest(data).streams for s in stream.shards)

    def build_there(number: int) -> tuple[str, Path, Callable[[], object]]:
        out, disk = f"s3://{BUCKET}/{number}/data", root / f"work{number}"
        there = config.model_copy(update={"out": out, "work": str(disk)})
        return out, disk, lambda: build(there)

    def train_from(location: str, number: int) -> tuple[str, Path, Callable[[], object]]:
        remote, folder = f"s3://{BUCKET}/{number}/run", root / f"run{number}"
        return remote, folder, lambda: train_there(location, folder, log_of(folder), remote, 12 * largest)

    def alone(work: Callable[[], object]) -> float:
        began = time.monotonic()
        status = os.waitstatus_to_exitcode(os.waitpid(start(work, output).pid, 0)[1])
        assert status == 0, output.read_text()
        return time.monotonic() - began

    location, _, work = build_there(0)
    build_seconds = alone(work)
    assert_same_objects(location, data)
    _, quiet, work = train_from(location, 0)
    train_seconds = alone(work)
    expected = steps_of(log_of(quiet))
    last = max(expected)
    print(f"quiet: built in {build_seconds:.0f} s, {last} steps in {train_seconds:.0f} s", flush=True)
    ends = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < ends:
        rounds += 1
        world.proxy.add(*FAULTS)
        world.next_server_kill = time.monotonic() + world.rng.uniform(1, 20)
        location, disk, work = build_there(rounds)
        do_to_the_end(world, "prep", work, disk, output, longest=build_seconds, ends=ends)
        remote, folder, work = train_from(location, rounds)
        do_to_the_end(world, "training", work, folder, output, longest=train_seconds / 8, ends=ends)
        world.calm()
        assert_same_objects(location, data)
        found = steps_of(log_of(folder))
        assert found == expected, [step for step in expected if found.get(step) != expected[step]]
        assert_same_weights(folder, quiet, step=last)
        assert_whole_in_bucket(remote, quiet, root / "empty", step=last)
        shutil.rmtree(folder)
        shutil.rmtree(disk, ignore_errors=True)
        print(f"round {rounds}: same objects, packs and weights; so far {shown(world)}", flush=True)
    print(
        f"{rounds} rounds of {last} steps: shards byte for byte, weights bit for bit the quiet one's; data lost: none"
    )
    print(shown(world))
    print(f"left in the temporary folder and in shared memory: {', '.join(litter(root)) or 'nothing'}")


def shown(world: World) -> str:
    counts = [*sorted(world.counts.items()), *sorted(world.proxy.counts().items())]
    return ", ".join(f"{name} {count}" for name, count in counts)


if __name__ == "__main__":
    sys.exit(main())
