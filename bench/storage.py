"""Throughput to and from an S3 server: ours next to boto3's transfer manager and rclone, on the same files in one run.

    python bench/storage.py [--megabytes 512] [--files 16] [--rounds 3] [--folder /dev/shm]

A SeaweedFS is started on the loopback, so nothing waits for a network: what is compared is work per byte. Ours does
more of it (MD5 of each part, sha256 of each file, comparison with what arrived), and the same with a sha256 of each
file in the end is shown for boto3's downloads too. `training` reads shards as `streaming_rwkv.data` does, into memory.
Each round does all of them in another order; the medians are printed, and as a ratio to the best. The bound is 0.8.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from prep.dataset.finished import RemoteDataSet
from prep.dataset.upload import Transfers
from streaming_rwkv.shards import sha256_of_file
from streaming_rwkv.storage import Store, open_store
from tools.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, running

BOUND = 0.8
AT_ONCE = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", help="the folder of files and of the server's volumes; by default the temporary folder"
    )
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="bench-storage-", dir=options.folder) as folder,
        running(Path(folder) / "server") as server,
    ):
        server.create_bucket("bench")
        os.environ.update(server.environment)
        files = write_files(Path(folder) / "files", count=options.files, size=options.megabytes * 1_000_000)
        hashes = {file.name: sha256_of_file(file) for file in files}
        with contextlib.closing(open_store("s3://bench")) as store:
            measured = measure(server, store, files, hashes, rounds=options.rounds, scratch=Path(folder) / "scratch")
    return report(measured, megabytes=options.megabytes)


def write_files(folder: Path, *, count: int, size: int) -> list[Path]:
    """Write random bytes, as incompressible as shards."""
    folder.mkdir()
    draw = random.Random(0)
    for number in range(count):
        (folder / f"shard.{number:05}.mds.zstd").write_bytes(draw.randbytes(size // count))
    return sorted(folder.iterdir())


def measure(
    server: S3Server, store: Store, files: list[Path], hashes: dict[str, str], *, rounds: int, scratch: Path
) -> dict[str, dict[str, list[float]]]:
    """Return seconds by direction and program."""
    rclone = shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent))
    ups: dict[str, Callable[[], None]] = {
        "ours": lambda: upload_ours(store, "ours", files, hashes),
        "boto3": lambda: upload_boto3(server, "boto3", files),
    }
    downs: dict[str, Callable[[], None]] = {
        "ours": lambda: download_ours(store, "ours", hashes, scratch),
        "training": lambda: download_training(store, "ours", files),
        "boto3": lambda: download_boto3(server, "boto3", files, scratch),
        "boto3 + sha256": lambda: download_boto3(server, "boto3", files, scratch, hashes=hashes),
    }
    if rclone is not None:
        environment = rclone_environment(server)
        there = "bench:bench/rclone"
        ups["rclone"] = lambda: run_rclone(rclone, environment, str(files[0].parent), there)
        downs["rclone"] = lambda: run_rclone(rclone, environment, there, str(scratch))
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    draw = random.Random(1)
    for _ in range(rounds):
        store.delete(store.list())
        for direction, programs in (("up", ups), ("down", downs)):
            for name in draw.sample(sorted(programs), len(programs)):
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                begun = time.monotonic()
                programs[name]()
                seconds[direction][name].append(time.monotonic() - begun)
                if direction == "down" and name in ("boto3", "rclone"):
                    assert {file.name: sha256_of_file(file) for file in scratch.iterdir()} == hashes
    return seconds


def upload_ours(store: Store, prefix: str, files: list[Path], hashes: dict[str, str]) -> None:
    """Upload as `prep build` and `prep upload` do."""
    with Transfers(store) as transfers:
        for file in files:
            transfers.put(file, f"{prefix}/{file.name}", sha256=hashes[file.name])
        transfers.wait()


def download_ours(store: Store, prefix: str, hashes: dict[str, str], scratch: Path) -> None:
    """Download as `prep verify` does: each file checked, some ahead, none kept."""
    place = RemoteDataSet(store=store, folder=scratch)
    for _ in place.files([(f"{prefix}/{name}", sha256) for name, sha256 in hashes.items()]):
        pass


def download_training(store: Store, prefix: str, files: list[Path]) -> None:
    """Download as streams do, in several loader workers."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sizes = {f"{prefix}/{file.name}": file.stat().st_size for file in files}
        for content in pool.map(lambda name: store.get_bytes(name, most=sizes[name]), sizes):
            assert content


def upload_boto3(server: S3Server, prefix: str, files: list[Path]) -> None:
    """Upload files and parts in parallel: the transfer manager's own threads, on as many files as ours."""
    with server.client() as client, ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda file: client.upload_file(str(file), "bench", f"{prefix}/{file.name}"), files))


def download_boto3(
    server: S3Server, prefix: str, files: list[Path], scratch: Path, *, hashes: dict[str, str] | None = None
) -> None:
    with server.client() as client, ThreadPoolExecutor(AT_ONCE) as pool:

        def download(name: str) -> None:
            client.download_file("bench", f"{prefix}/{name}", str(scratch / name))
            if hashes is not None:
                assert sha256_of_file(scratch / name) == hashes[name]

        list(pool.map(download, [file.name for file in files]))


def rclone_environment(server: S3Server) -> dict[str, str]:
    settings = {
        "TYPE": "s3",
        "PROVIDER": "SeaweedFS",
        "ENDPOINT": server.endpoint,
        "ACCESS_KEY_ID": ACCESS_KEY,
        "SECRET_ACCESS_KEY": SECRET_KEY,
    }
    return {**os.environ, **{f"RCLONE_CONFIG_BENCH_{key}": value for key, value in settings.items()}}


def run_rclone(program: str, environment: dict[str, str], source: str, target: str) -> None:
    command = [program, "copy", f"--transfers={AT_ONCE}", "--config=", source, target]
    subprocess.run(command, env=environment, check=True, capture_output=True)


def report(measured: dict[str, dict[str, list[float]]], *, megabytes: float) -> int:
    failed = 0
    for direction, programs in measured.items():
        rates = {name: megabytes / statistics.median(seconds) for name, seconds in programs.items()}
        best = max(rates.values())
        for name, rate in sorted(rates.items(), key=lambda pair: -pair[1]):
            spread = f"{megabytes / max(programs[name]):.0f}…{megabytes / min(programs[name]):.0f}"
            print(f"{direction:4} {name:14} {rate:7.0f} MB/s ({spread})  {rate / best:.2f} of the best")
        failed |= rates["ours"] < BOUND * best
    print(f"bound: ours at least {BOUND} of the best: {'missed' if failed else 'held'}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
