"""Corpora on S3 are read as from a folder, through a real server."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.build import build
from prep.execution.task_store import WorkError
from prep.inputs import files
from prep.inputs.discovery import find_files
from streaming_rwkv.config import UserError
from streaming_rwkv.storage import StorageError, open_store
from tests.fault_proxy import Fault, FaultProxy


@pytest.fixture
def proxy(s3_server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as running:
        yield running


@pytest.fixture
def mixed(s3_server, s3_place, write_lines, tmp_path) -> str:
    """Create a corpus in a folder, and a copy in a bucket."""
    files.bucket_store.cache_clear()
    root = tmp_path / "corpus"
    write_lines(root / "a.jsonl", [f"line {number}" for number in range(400)])
    write_lines(root / "deep" / "b.json.gz", ["two"])
    pq.write_table(
        pa.table({"text": [f"row {number}" for number in range(100)]}), root / "c.parquet", row_group_size=25
    )
    bucket, _, prefix = s3_place.removeprefix("s3://").partition("/")
    with s3_server.client() as client:
        for file in root.rglob("*"):
            if file.is_file():
                client.upload_file(str(file), bucket, f"{prefix}/{file.relative_to(root)}")
    return s3_place


def content(out: Path) -> dict[str, bytes]:
    paths = [path for path in out.rglob("*") if path.is_file() and ".prep" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "fork"), [(1, False), (2, False), (4, True)])
def test_a_bucket_is_read_as_a_folder(config, mixed, tmp_path, workers, fork):
    build(config(out=str(tmp_path / "local"), unit_bytes=1 << 20))
    sources = {"corpus": {"paths": mixed}}
    remote = config(out=str(tmp_path / "remote"), sources=sources, workers=workers, unit_bytes=1 << 20)
    assert build(remote, fork=fork).manifest.counts["corpus"].documents["train"] == 501
    assert content(tmp_path / "remote") == content(tmp_path / "local")
    assert build(remote).was_finished


@pytest.mark.slow
def test_globs_and_single_objects_are_found(config, mixed, tmp_path):
    for path, documents in (("*.parquet", 100), ("a.jsonl", 400)):
        sources = {"corpus": {"paths": f"{mixed}/{path}"}}
        manifest = build(config(out=str(tmp_path / path[-5:]), sources=sources)).manifest
        assert manifest.counts["corpus"].documents_read == documents


@pytest.mark.slow
def test_the_same_files_are_found_as_in_a_folder(mixed, s3_server, tmp_path, caplog):
    caplog.set_level("INFO")
    bucket, _, prefix = mixed.removeprefix("s3://").partition("/")
    with s3_server.client() as client:
        names = [".hidden/x.jsonl", "deep/.hidden/x.jsonl", "deep/_x.jsonl", "deep/x.txt", "deeper.jsonl"]
        names += ["D.JSONL", "deep/d.ndjson.XZ", "_tmp/e.jsonl", "deep/_tmp/e.jsonl", "deep/_k=v/f.jsonl", "x.csv.gz"]
        for name in names:
            client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=b"{}")
            (tmp_path / "corpus" / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / "corpus" / name).write_bytes(b"{}")
    paths = ("", "/", "/*", "/d*", "/deep", "/deep/b.json.gz", "/.hidden", "/**/*.jsonl", "/deep/_x.jsonl")
    paths += ("/_tmp", "/_t*", "/*/_tmp/*", "/*.JSONL", "/deep/_tmp/e.jsonl")
    for path in paths:
        found = [file.name for file in find_files("s", [mixed + path])]
        assert found == [file.name for file in find_files("s", [f"{tmp_path}/corpus{path}"])], path
        told = [record.getMessage() for record in caplog.records if record.name == "prep.inputs.discovery"]
        remote, local = told or ["", ""]
        assert remote == local, path
        caplog.clear()
    with pytest.raises(UserError, match=r"sources\.s: s3://\S+/deep/x\.txt: cannot be read; files must end in"):
        find_files("s", [f"{mixed}/deep/x.txt"])


@pytest.mark.slow
def test_a_changed_object_is_noticed(config, mixed, s3_server):
    remote = config(sources={"corpus": {"paths": mixed}})
    build(remote)
    bucket, _, prefix = mixed.removeprefix("s3://").partition("/")
    with s3_server.client() as client:
        client.put_object(Bucket=bucket, Key=f"{prefix}/a.jsonl", Body=b'{"text": "changed"}\n')
    with pytest.raises(WorkError, match=r"files/corpus/a\.jsonl: \d+ bytes"):
        build(remote)


@pytest.mark.slow
def test_a_bucket_that_is_not_there_names_what_to_check(config, mixed):
    with pytest.raises(
        UserError, match=r"sources\.corpus: s3://no-such-bucket: .*there is no such bucket; .*check its name"
    ):
        build(config(sources={"corpus": {"paths": "s3://no-such-bucket/x"}}))


@pytest.mark.slow
def test_an_object_that_cannot_be_read_is_not_taken_for_a_broken_file(config, mixed, proxy, monkeypatch):
    """An object that cannot be read for a while is read later."""
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
    recipe = config(sources={"corpus": {"paths": mixed}})
    names = ("a.jsonl", "deep/b.json.gz", "c.parquet")
    with monkeypatch.context() as patched:
        patched.setattr(
            files, "bucket_store", lru_cache(lambda bucket: open_store(f"s3://{bucket}", timeout_seconds=4))
        )
        for name in names:
            proxy.clear()
            proxy.add(Fault(kind="silent", method="GET", path=name))
            with pytest.raises(StorageError, match=rf"{name}: cannot read it at \S+.*: timed out"):
                build(recipe)
    proxy.clear()
    proxy.add(Fault(kind="status", status=503, times=5))
    proxy.add(*(Fault(kind="reset", method="GET", path=name, times=1) for name in names))
    assert build(recipe).manifest.counts["corpus"].documents_read == 501
    assert proxy.counts()["status 503"] == 5
    assert proxy.counts()["reset"] == 3
