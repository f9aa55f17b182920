"""Corpora on S3 are read as from a folder, through a real server."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.pipeline import build
from prep.work import WorkError
from streaming_rwkv.config import UserError

boto3 = pytest.importorskip("boto3")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a SeaweedFS that speaks S3."""
    folder = tmp_path_factory.mktemp("weed")
    names = ("-master.port", "-volume.port", "-filer.port", "-s3.port")
    ports = {name: free_port() for name in names}
    # gRPC would take port + 10000, which may not exist.
    grpc = {f"{name}.grpc": free_port() for name in names}
    flags = [f"{name}={port}" for name, port in (ports | grpc).items()]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("weed")),
                "server",
                f"-dir={folder}",
                "-s3",
                "-ip=127.0.0.1",
                "-master.volumeSizeLimitMB=64",
                "-volume.max=50",
                *flags,
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        address = f"http://127.0.0.1:{ports['-s3.port']}"
        try:
            _wait_until_it_answers(address, process, folder / "log")
            yield address
        finally:
            process.kill()
            process.wait()


def _wait_until_it_answers(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(address, timeout=2).close()
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            time.sleep(0.2)
            continue
        return
    raise AssertionError(log.read_text()[-2000:])


@pytest.fixture
def mixed(server, monkeypatch, write_lines, tmp_path) -> str:
    """A corpus in a folder, and the same in a bucket."""
    monkeypatch.setenv("S3_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    from prep import files

    files._s3.cache_clear()
    root = tmp_path / "corpus"
    write_lines(root / "a.jsonl", [f"line {number}" for number in range(400)])
    write_lines(root / "deep" / "b.json.gz", ["two"])
    pq.write_table(
        pa.table({"text": [f"row {number}" for number in range(100)]}), root / "c.parquet", row_group_size=25
    )
    client = boto3.client("s3", endpoint_url=server)
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="corpora")
    for file in root.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), "corpora", f"{tmp_path.name}/{file.relative_to(root)}")
    client.close()
    return f"corpora/{tmp_path.name}"


def content(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and ".prep" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bucket_is_read_as_a_folder(config, mixed, tmp_path, workers):
    build(config(out=str(tmp_path / "local"), unit_bytes=1 << 20))
    sources = {"corpus": {"paths": f"s3://{mixed}"}}
    remote = config(out=str(tmp_path / "remote"), sources=sources, workers=workers, unit_bytes=1 << 20)
    assert build(remote).manifest.books["corpus"].documents["train"] == 501
    assert content(tmp_path / "remote") == content(tmp_path / "local")
    assert build(remote).was_finished


@pytest.mark.slow
def test_globs_and_single_objects(config, mixed, tmp_path):
    for path, documents in (("*.parquet", 100), ("a.jsonl", 400)):
        sources = {"corpus": {"paths": f"s3://{mixed}/{path}"}}
        manifest = build(config(out=str(tmp_path / path[-5:]), sources=sources)).manifest
        assert manifest.books["corpus"].documents_read == documents


@pytest.mark.slow
def test_a_changed_object_is_noticed(config, mixed, server):
    remote = config(sources={"corpus": {"paths": f"s3://{mixed}"}})
    build(remote)
    client = boto3.client("s3", endpoint_url=server)
    client.put_object(Bucket="corpora", Key=f"{mixed.partition('/')[2]}/a.jsonl", Body=b'{"text": "changed"}\n')
    client.close()
    with pytest.raises(WorkError, match=r"files/corpus/a\.jsonl: \d+ bytes"):
        build(remote)


@pytest.mark.slow
def test_a_bucket_that_is_not_there_names_what_to_check(config, mixed):
    with pytest.raises(
        UserError, match=r"s3://no-such-bucket/x: .*check the bucket, the credentials, and S3_ENDPOINT_URL"
    ):
        build(config(sources={"corpus": {"paths": "s3://no-such-bucket/x"}}))
