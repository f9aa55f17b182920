"""Object storage against a real server: what goes up comes down, and failures are clear errors in bounded time."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from streaming_rwkv.location import LocationError
from streaming_rwkv.storage import ObjectMissing, StorageError, Store, StoredObject, content, open_store
from streaming_rwkv.storage.requests import FaultyAnswer, Moved
from tests.fault_proxy import Fault, FaultProxy
from tools.s3_server import ACCESS_KEY, S3Server

BUSY = 500.0  # seconds that a machine may need for all else: below the 1,000 that the slowest server would take
SMALL_PART = 5 << 20  # the least that S3 takes for a part which is not the last


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def connected(s3_server: S3Server) -> Iterator[Store]:
    """A client takes a third of a second to make: all tests share one."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in s3_server.environment.items():
            patched.setenv(name, value)
        with opened("s3://tests") as store:
            store.list()
            yield store


@pytest.fixture
def store(connected: Store, s3_place: str) -> Store:
    return replace(connected, prefix=s3_place.rpartition("/")[2])


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "PART_BYTES", SMALL_PART)


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, str]:
    """A file of two parts and a bit, and its sha256."""
    content = os.urandom(2 * SMALL_PART + 1000)
    (tmp_path / "large").write_bytes(content)
    return tmp_path / "large", sha256(content)


@pytest.fixture(scope="module")
def running_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(running_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, store: Store) -> Iterator[FaultProxy]:
    """Faults between client and server; the environment leads there."""
    monkeypatch.setenv("S3_ENDPOINT_URL", running_proxy.url)
    before = running_proxy.counts()
    monkeypatch.setattr(running_proxy, "counts", lambda: FaultProxy.counts(running_proxy) - before)
    yield running_proxy
    running_proxy.clear()


@pytest.fixture(scope="module")
def connected_through_proxy(running_proxy: FaultProxy, connected: Store) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("S3_ENDPOINT_URL", running_proxy.url)
        with opened("s3://tests") as store:
            store.list()
            yield store


@contextlib.contextmanager
def opened(location: str, *, timeout_seconds: float = 20) -> Iterator[Store]:
    store = open_store(location, timeout_seconds=timeout_seconds)
    try:
        yield store
    finally:
        store.close()


def writes(server: S3Server, store: Store, name: str) -> tuple[str, Any]:
    """The values of an object that change when it is written again."""
    with server.client() as client:
        head = client.head_object(Bucket=store.bucket, Key=f"{store.prefix}/{name}")
    return head["ETag"], head["LastModified"]


def unfinished(server: S3Server, store: Store) -> int:
    with server.client() as client:
        return len(client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix).get("Uploads", []))


# --- what goes up comes down ---


def test_bytes_are_uploaded_and_downloaded_unchanged(store: Store) -> None:
    assert store.put_bytes(b"hello", "a/b")
    assert store.get_bytes("a/b", most=5) == b"hello"
    assert store.find("a/b") == StoredObject(size=5, sha256=sha256(b"hello"), etag=hashlib.md5(b"hello").hexdigest())
    assert store.put_bytes(b"", "empty")
    assert store.get_bytes("empty", most=0) == b""


def test_names_are_relative_to_the_prefix_and_stop_at_its_end(store: Store) -> None:
    store.put_bytes(b"1", "x/1")
    store.put_bytes(b"22", "y")
    neighbour = open_store(f"{store.location}-neighbour")
    neighbour.put_bytes(b"3", "z")
    neighbour.close()
    assert store.list() == {"x/1": 1, "y": 2}
    assert store.list("x/") == {"x/1": 1}
    assert store.url("x/1") == f"{store.location}/x/1"


def test_long_listings_come_in_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming_rwkv.storage.store._PAGE_ENTRIES", 2)
    for number in range(5):
        store.put_bytes(b"", str(number))
    assert list(store.list()) == ["0", "1", "2", "3", "4"]


def test_a_large_file_is_uploaded_in_parts(
    store: Store, large: tuple[Path, str], small_parts: None, tmp_path: Path
) -> None:
    file, digest = large
    assert store.put_file(file, "large", sha256=digest)
    found = store.find("large")
    assert found is not None
    assert (found.size, found.sha256) == (2 * SMALL_PART + 1000, digest)
    assert found.etag.endswith("-3")
    store.get_file("large", tmp_path / "back", most=1 << 30, sha256=digest)
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


def test_an_object_that_is_stored_is_not_uploaded_again(
    store: Store, s3_server: S3Server, large: tuple[Path, str], small_parts: None
) -> None:
    file, digest = large
    store.put_file(file, "large", sha256=digest)
    before = writes(s3_server, store, "large")
    time.sleep(1.1)  # times of objects are whole seconds
    assert not store.put_file(file, "large", sha256=digest)
    assert writes(s3_server, store, "large") == before
    file.write_bytes(b"another content")
    assert store.put_file(file, "large", sha256=sha256(b"another content"))
    assert writes(s3_server, store, "large") != before


def test_a_file_that_was_damaged_on_this_machine_is_not_uploaded(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"damaged")
    with pytest.raises(StorageError, match=r"file: sha256 \w+ is not the expected .* build it again"):
        store.put_file(tmp_path / "file", "file", sha256=sha256(b"whole"))
    assert store.list() == {}


def test_deleting_a_missing_object_is_no_error(store: Store) -> None:
    store.put_bytes(b"1", "a")
    store.put_bytes(b"2", "b")
    store.delete(["a", "never there"])
    assert store.list() == {"b": 1}


def test_a_file_appears_when_it_is_whole(store: Store, s3_server: S3Server, tmp_path: Path) -> None:
    store.put_bytes(b"content", "object")
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(StorageError, match=r"object: fetched twice, and its checksum .* is not the expected 0000"):
        store.get_file("object", tmp_path / "file", most=1 << 30, sha256="0000")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
    store.get_file("object", tmp_path / "file", most=1 << 30)
    assert (tmp_path / "file").read_bytes() == b"content"


def test_an_object_that_was_replaced_by_other_bytes_is_an_error(store: Store, s3_server: S3Server) -> None:
    store.put_bytes(b"content", "object")
    with s3_server.client() as client:
        metadata = {"sha256": sha256(b"content")}
        client.put_object(Bucket=store.bucket, Key=f"{store.prefix}/object", Body=b"c0ntent", Metadata=metadata)
    with pytest.raises(StorageError, match="object: fetched twice, and its checksum"):
        store.get_bytes("object", most=100)
    assert store.put_bytes(b"content", "object")  # size and sha256 are as they should be; what arrived is not
    assert store.get_bytes("object", most=100) == b"content"


def test_an_object_is_not_read_beyond_what_is_expected(store: Store) -> None:
    store.put_bytes(b"0123456789", "object")
    with pytest.raises(StorageError, match="object: 10 bytes; at most 9 are expected here"):
        store.get_bytes("object", most=9)


def test_an_object_is_opened_as_a_file(store: Store, large: tuple[Path, str]) -> None:
    store.put_file(large[0], "large", sha256=large[1])
    with store.open("large") as remote, large[0].open("rb") as local:
        for position in (0, SMALL_PART - 10, 7, 2 * SMALL_PART + 990):
            assert remote.seek(position) == local.seek(position)
            assert remote.read(SMALL_PART) == local.read(SMALL_PART)
    with pytest.raises(ObjectMissing, match=r"nothing: cannot look for it at http.*: 404"):
        store.open("nothing")


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(store: Store, large: tuple[Path, str]) -> None:
    store.put_file(large[0], "object", sha256=large[1])
    with store.open("object") as file:
        assert file.read(4) == large[0].read_bytes()[:4]
        store.put_bytes(large[0].read_bytes()[::-1], "object")
        with pytest.raises(StorageError, match=r"object: cannot read it at .*: it was replaced while it was read"):
            file.read()


def test_a_listing_tells_when_objects_were_written(store: Store) -> None:
    begun = int(time.time())
    store.put_bytes(b"12", "x/1")
    ((name, size, written_ns),) = store.walk("x/")
    assert (name, size) == ("x/1", 2)
    assert begun <= written_ns // 10**9 <= time.time() + 1


def test_a_store_can_be_pickled_and_survives_a_fork(store: Store) -> None:
    store.put_bytes(b"1", "a")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.get_bytes("a", most=1) == b"1"
    copy.close()
    child = os.fork()
    if child == 0:
        os._exit(0 if store.get_bytes("a", most=1) == b"1" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_writing_is_tried_without_leaving_anything(store: Store, s3_server: S3Server) -> None:
    store.check_writable()
    assert store.list() == {}
    assert unfinished(s3_server, store) == 0


# --- what killed programs leave ---


def test_unfinished_uploads_are_aborted(
    store: Store, s3_server: S3Server, large: tuple[Path, str], small_parts: None
) -> None:
    with s3_server.client() as client:
        for name in ("large", "other"):
            key = {"Bucket": store.bucket, "Key": f"{store.prefix}/{name}"}
            upload = client.create_multipart_upload(**key)["UploadId"]
            client.upload_part(**key, UploadId=upload, PartNumber=1, Body=b"left behind")
    assert unfinished(s3_server, store) == 2
    store.put_file(large[0], "large", sha256=large[1])  # clears its own
    assert unfinished(s3_server, store) == 1
    assert store.abort_unfinished() == 1
    assert unfinished(s3_server, store) == 0
    assert list(store.list()) == ["large"]


def test_an_upload_that_fails_leaves_nothing(
    store: Store, s3_server: S3Server, proxy: FaultProxy, large: tuple[Path, str], small_parts: None
) -> None:
    with opened(store.location, timeout_seconds=10) as proxied:
        proxy.add(Fault(kind="status", status=500, method="PUT", path="partNumber=2"))
        with pytest.raises(StorageError, match=r"large: cannot upload it at .* attempts in .*: the server answers 500"):
            proxied.put_file(large[0], "large", sha256=large[1])
    assert store.list() == {}
    assert unfinished(s3_server, store) == 0


# --- what goes wrong, and what is said ---


def test_other_places_and_addresses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LocationError, match="gs://bucket/x: scheme 'gs' is not supported"):
        open_store("gs://bucket/x")
    with pytest.raises(StorageError, match="bucket/x: not a place in object storage; write s3://bucket/prefix"):
        open_store("bucket/x")
    with pytest.raises(LocationError, match="s3:///x: not a place"):
        open_store("s3:///x")
    queries = ("http://localhost:8333/?sig=xyz", "http://localhost:8333/#x")
    for endpoint in ("localhost:8333", "http://[::1", "http://localhost:99999", "http://", *queries):
        monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
        with pytest.raises(StorageError, match=r"S3_ENDPOINT_URL: .* is no address; write http://HOST:PORT"):
            open_store("s3://bucket")


def test_without_boto3_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(StorageError, match=r"boto3 is not installed, .*; run `pip install '\.\[s3\]'` in a clone"):
        open_store("s3://bucket/x")


def test_a_missing_object_and_a_missing_bucket_are_named(store: Store) -> None:
    assert store.find("nothing") is None
    with pytest.raises(
        ObjectMissing, match=r"nothing: cannot read it at http.*: 404 NoSuchKey: there is no such object"
    ):
        store.get_bytes("nothing", most=1)
    nowhere = open_store("s3://no-such-bucket/x")
    for use in (nowhere.list, nowhere.check_writable, lambda: nowhere.put_bytes(b"1", "a")):
        with pytest.raises(
            StorageError, match=r"at http\S+: 404 NoSuchBucket: there is no such bucket; create it, or check its name"
        ) as raised:
            use()
        assert " attempts in " not in str(raised.value)
    nowhere.close()


def test_wrong_credentials_are_an_error_at_once_that_shows_none(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    stranger = open_store(store.location)
    caplog.set_level(logging.INFO)
    with pytest.raises(StorageError, match=r"403 SignatureDoesNotMatch: refused; check AWS_ACCESS_KEY_ID") as raised:
        stranger.list()
    with pytest.raises(StorageError, match="403"):
        stranger.put_bytes(b"1", "a")
    stranger.close()
    assert " attempts in " not in str(raised.value)
    shown = f"{raised.value!r} {stranger!r} {caplog.text} {raised.value.__cause__!r}"
    assert "wrong-secret" not in shown
    assert ACCESS_KEY not in shown


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_a_line_break_in_a_credential_is_an_error_at_once(
    name: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "hidden\n")
    stranger = open_store(store.location)
    with pytest.raises(
        StorageError, match=rf"^{name}: has a line break, .*\(found in: env\); set it without$"
    ) as raised:
        stranger.list()
    stranger.close()
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize(("name", "value"), [("AWS_PROFILE", "nope"), ("AWS_DEFAULT_REGION", "bad region!")])
def test_a_wrong_variable_of_the_store_is_named(
    name: str, value: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    stranger = open_store(store.location)
    with pytest.raises(StorageError, match=name) as raised:
        stranger.list()
    stranger.close()
    assert value in str(raised.value)


def test_missing_credentials_are_named(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    stranger = open_store(store.location)
    with pytest.raises(StorageError, match="no credentials; check AWS_ACCESS_KEY_ID"):
        stranger.list()
    stranger.close()


def test_an_address_where_nobody_answers_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming_rwkv.storage.requests._MISCONFIGURED_SECONDS", 1.0)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://user:hidden@127.0.0.1:9")
    lost = open_store(store.location)
    with pytest.raises(StorageError, match=r"cannot connect; check S3_ENDPOINT_URL") as raised:
        lost.list()
    lost.close()
    assert f"{store.location}: cannot list it at http://127.0.0.1:9" in str(raised.value)
    assert "hidden" not in str(raised.value) + repr(lost)


# --- faults that pass ---


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_burst_of_refusals_passes(
    store: Store, proxy: FaultProxy, connected_through_proxy: Store, status: int
) -> None:
    proxied = replace(connected_through_proxy, prefix=store.prefix)
    proxy.add(Fault(kind="status", status=status, times=3))
    assert proxied.put_bytes(b"content", "a")
    assert proxy.counts()[f"status {status}"] == 3
    assert store.get_bytes("a", most=7) == b"content"


@pytest.mark.parametrize("kind", ["reset upload", "flip upload", "lose answer"])
def test_an_upload_that_is_damaged_on_its_way_arrives_whole(
    store: Store,
    proxy: FaultProxy,
    connected_through_proxy: Store,
    s3_server: S3Server,
    large: tuple[Path, str],
    small_parts: None,
    tmp_path: Path,
    kind: Any,
) -> None:
    proxied = replace(connected_through_proxy, prefix=store.prefix)
    proxy.add(Fault(kind=kind, method="PUT", times=2), Fault(kind="lose answer", method="POST", skip=1, times=1))
    assert proxied.put_file(large[0], "large", sha256=large[1])
    assert proxy.counts()[kind] == 2 + (kind == "lose answer")
    store.get_file("large", tmp_path / "back", most=1 << 30, sha256=large[1])
    assert unfinished(s3_server, store) == 0


@pytest.mark.parametrize("kind", ["reset", "truncate", "shorten", "flip"])
def test_a_download_that_is_damaged_on_its_way_arrives_whole(
    store: Store, proxy: FaultProxy, connected_through_proxy: Store, large: tuple[Path, str], tmp_path: Path, kind: Any
) -> None:
    store.put_file(large[0], "large", sha256=large[1])
    proxied = replace(connected_through_proxy, prefix=store.prefix)
    proxy.add(Fault(kind=kind, method="GET", times=1))
    proxied.get_file("large", tmp_path / "back", most=1 << 30, sha256=large[1])
    assert proxy.counts()[kind] == 1
    assert (tmp_path / "back").read_bytes() == large[0].read_bytes()


@pytest.mark.parametrize("kind", ["status", "reset", "truncate", "shorten"])
def test_an_open_object_is_read_through_faults(
    store: Store, proxy: FaultProxy, connected_through_proxy: Store, large: tuple[Path, str], kind: Any
) -> None:
    store.put_file(large[0], "large", sha256=large[1])
    proxy.add(Fault(kind=kind, method="GET", skip=2, times=3))
    with replace(connected_through_proxy, prefix=store.prefix).open("large") as file:
        assert file.read() == large[0].read_bytes()
    assert proxy.counts() == {"status 503" if kind == "status" else kind: 3}


def test_a_broken_download_resumes_where_it_stopped(
    store: Store, proxy: FaultProxy, large: tuple[Path, str], tmp_path: Path
) -> None:
    store.put_file(large[0], "large", sha256=large[1])
    with opened(store.location, timeout_seconds=4) as proxied:
        proxy.add(Fault(kind="reset", method="GET", times=5))
        proxied.get_file("large", tmp_path / "back", most=1 << 30)  # half of the rest each time
    assert (tmp_path / "back").read_bytes() == large[0].read_bytes()


# --- faults that do not pass ---


@pytest.mark.parametrize("kind", ["slow", "silent"])
def test_an_endlessly_slow_server_ends_in_an_error_within_the_stated_time(
    store: Store, proxy: FaultProxy, tmp_path: Path, kind: Any
) -> None:
    store.put_bytes(bytes(1000), "object")
    with opened(store.location, timeout_seconds=2) as proxied:
        proxied.list()
        proxy.add(Fault(kind=kind, method="GET"))
        begun = time.monotonic()
        with pytest.raises(
            StorageError, match=r"object: cannot read it at .*: timed out, since the server stopped responding"
        ):
            proxied.get_file("object", tmp_path / "file", most=1 << 30)
        assert time.monotonic() - begun < 2 * 1.25 + BUSY
        proxy.clear()
    assert not list(tmp_path.glob("*"))


@pytest.mark.slow
@pytest.mark.alone  # the server must be back before patience ends
def test_a_server_that_is_killed_and_started_again_is_waited_for(
    store: Store, s3_server: S3Server, large: tuple[Path, str], small_parts: None, tmp_path: Path
) -> None:
    s3_server.kill()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(store.put_file, large[0], "large", sha256=large[1])
        time.sleep(2)
        assert not upload.done()
        s3_server.start()
        assert upload.result()
    store.get_file("large", tmp_path / "back", most=1 << 30, sha256=large[1])


class Listing:
    """A client that answers each request with the same page."""

    def __init__(self, page: dict[str, Any]) -> None:
        self.page = page

    def list_objects_v2(self, **_: str) -> dict[str, Any]:
        return self.page

    list_multipart_uploads = head_object = list_objects_v2


ENTRY = {"Key": "a/b", "Size": 5, "LastModified": datetime.now(timezone.utc)}


@pytest.mark.parametrize(
    "page",
    [
        {"Contents": [ENTRY], "IsTruncated": True},
        {
            "Contents": [ENTRY],
            "IsTruncated": True,
            "NextContinuationToken": "1",
            "NextKeyMarker": "1",
        },  # again and again
        {"Contents": [{**ENTRY, "Key": None}], "Uploads": [{}]},
        {"Contents": [{**ENTRY, "Size": "many"}], "Uploads": 5},
        {"Contents": [{**ENTRY, "LastModified": "today"}], "Uploads": [None]},
        {"Contents": [{}], "Uploads": [{"Key": "a"}]},
        {"Contents": 5, "Uploads": [5]},
    ],
)
def test_an_answer_that_is_not_s3s_is_the_servers_fault(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(store: Store, verb: str, name: str, call: Any, **_: Any) -> Any:
        return call(Listing(page), None)

    monkeypatch.setattr(Store, "_ask", ask)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with contextlib.closing(open_store("s3://bucket/a")) as store:
        for request in (store.list, store.abort_unfinished, lambda: store.find("b")):
            with pytest.raises(FaultyAnswer, match=r"its answer is not one of S3|the pages of its listing have no end"):
                request()


class Endless:
    """A client that answers each request for a part with more than was asked for."""

    def __init__(self) -> None:
        self.sent = 0

    def get_object(self, **_: str) -> dict[str, Any]:
        return {"Body": self, "ResponseMetadata": {"HTTPStatusCode": 206}}

    def read(self, size: int) -> bytes:
        self.sent += size
        return b"x" * size

    def close(self) -> None:
        """Nothing is open."""


def test_more_bytes_than_were_asked_for_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    client, moved = Endless(), Moved()

    def ask(store: Store, verb: str, name: str, call: Any, **_: Any) -> Any:
        return call(client, moved)

    monkeypatch.setattr(Store, "_ask", ask)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    found = StoredObject(size=1 << 40, sha256=None, etag="e", written_ns=0)
    kept: list[bytes] = []
    with (
        contextlib.closing(open_store("s3://bucket/a")) as store,
        pytest.raises(FaultyAnswer, match="more than the 100,000 bytes came that were asked for"),
    ):
        store._fetch("b", kept.append, of=found, begin=5, end=100_005)
    assert sum(map(len, kept)) <= 100_000
    assert client.sent < 1 << 22
