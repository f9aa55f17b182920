"""Buckets that anybody may read, and those whose readers pay: by a real server, and by the headers that are sent."""

from __future__ import annotations

import contextlib
import http.server
import pickle
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming_rwkv.storage import StorageError, open_store
from tools.s3_server import PUBLIC_BUCKET, S3Server

LISTING = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>'


@pytest.fixture
def corpus(s3_server: S3Server, s3_place: str) -> str:
    """A file in a public bucket."""
    s3_server.create_bucket(PUBLIC_BUCKET)
    prefix = uuid.uuid4().hex
    with s3_server.client() as client:
        client.put_object(Bucket=PUBLIC_BUCKET, Key=f"{prefix}/a.jsonl", Body=b'{"text": "x"}\n')
    return f"s3://{PUBLIC_BUCKET}/{prefix}"


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("value", [PUBLIC_BUCKET, f"other, s3://{PUBLIC_BUCKET}/"])
def test_a_public_bucket_is_read_without_credentials(
    corpus: str, no_credentials: None, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    with (
        contextlib.closing(open_store(corpus)) as store,
        pytest.raises(StorageError, match="or name it in S3_PUBLIC_BUCKETS"),
    ):
        store.list()
    monkeypatch.setenv("S3_PUBLIC_BUCKETS", value)
    with contextlib.closing(pickle.loads(pickle.dumps(open_store(corpus)))) as store:
        assert store.list() == {"a.jsonl": 14}
        with store.open("a.jsonl") as file:
            assert file.read() == b'{"text": "x"}\n'
        with pytest.raises(StorageError, match="403 AccessDenied: refused"):
            store.put_bytes(b"", "b")


def test_other_buckets_keep_their_credentials(corpus: str, s3_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_PUBLIC_BUCKETS", PUBLIC_BUCKET)
    with contextlib.closing(open_store(s3_place)) as store:
        assert store.put_bytes(b"mine", "a")


@pytest.mark.parametrize("value", ["a,b/c", "*", "https://a.example"])
def test_a_malformed_list_of_buckets_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("S3_REQUESTER_PAYS_BUCKETS", value)
    with pytest.raises(StorageError, match=r"S3_REQUESTER_PAYS_BUCKETS: (found|https)"):
        open_store("s3://bucket/x")


class _Recorder(http.server.BaseHTTPRequestHandler):
    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        self.send_response(200)
        self.send_header("Content-Length", str(len(LISTING)))
        self.end_headers()
        self.wfile.write(LISTING)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def seen(s3_place: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, str]]]:
    """The headers of all requests, by a server that lists nothing."""
    handler = type("Recorder", (_Recorder,), {"seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler.seen
        server.shutdown()


def test_headers_are_read_for_each_bucket(seen: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_PUBLIC_BUCKETS", "anybodys")
    monkeypatch.setenv("S3_REQUESTER_PAYS_BUCKETS", "arxiv,other")
    for bucket in ("mine", "anybodys", "arxiv"):
        with contextlib.closing(open_store(f"s3://{bucket}")) as store:
            assert store.list() == {}
    mine, anybodys, arxiv = seen
    assert mine["authorization"].startswith("AWS4-HMAC-SHA256 Credential=")
    assert "x-amz-request-payer" not in mine
    assert "authorization" not in anybodys
    assert arxiv["x-amz-request-payer"] == "requester"
    assert "x-amz-request-payer" in arxiv["authorization"]  # among the signed headers
