"""Corpora on S3 are read as from a folder, through a real server."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.pipeline import build
from prep.work import WorkError
from streaming_rwkv.config import UserError


@pytest.fixture
def mixed(s3_server, s3_place, write_lines, tmp_path) -> str:
    """A corpus in a folder, and the same in a bucket."""
    from prep import files

    files._s3.cache_clear()
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
    files = [path for path in out.rglob("*") if path.is_file() and ".prep" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "fork"), [(1, False), (2, False), (4, True)])
def test_a_bucket_is_read_as_a_folder(config, mixed, tmp_path, workers, fork):
    build(config(out=str(tmp_path / "local"), unit_bytes=1 << 20))
    sources = {"corpus": {"paths": mixed}}
    remote = config(out=str(tmp_path / "remote"), sources=sources, workers=workers, unit_bytes=1 << 20)
    assert build(remote, fork=fork).manifest.books["corpus"].documents["train"] == 501
    assert content(tmp_path / "remote") == content(tmp_path / "local")
    assert build(remote).was_finished


@pytest.mark.slow
def test_globs_and_single_objects(config, mixed, tmp_path):
    for path, documents in (("*.parquet", 100), ("a.jsonl", 400)):
        sources = {"corpus": {"paths": f"{mixed}/{path}"}}
        manifest = build(config(out=str(tmp_path / path[-5:]), sources=sources)).manifest
        assert manifest.books["corpus"].documents_read == documents


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
        UserError, match=r"s3://no-such-bucket/x: .*check the bucket, the credentials, and S3_ENDPOINT_URL"
    ):
        build(config(sources={"corpus": {"paths": "s3://no-such-bucket/x"}}))
