"""Object storage: S3-compatible servers (AWS, MinIO, Cloudflare R2, SeaweedFS), for preparation and training.

Every upload and download is verified:

- Uploads carry a Content-MD5 for each request, so a server refuses a damaged one, and the whole file's sha256 as
  metadata. Afterwards the ETag, which is the MD5 of what arrived, is compared with the file's; where a server's ETag is
  something else (encryption by KMS), the object is read back.
- Downloads are compared with the sha256, and get their name when they are complete.

`storage.requests` repeats requests: an operation fails after `timeout_seconds` without progress, plus at most a quarter
of that for the running attempt.

boto3 comes with the extra `s3` and is imported on first use.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Generic, TypeVar
from urllib.parse import urlsplit

from streaming_rwkv.extras import install_command
from streaming_rwkv.filesystem import atomic_file
from streaming_rwkv.location import LocationError, checked_location, is_remote
from streaming_rwkv.storage.content import Content, CountedBody, content_of, content_of_file
from streaming_rwkv.storage.remote_file import RemoteFile
from streaming_rwkv.storage.requests import (
    STEP_BYTES,
    Connection,
    FaultyAnswer,
    Moved,
    ObjectMissing,
    StorageError,
    UploadMissing,
)

__all__ = ["ObjectMissing", "StorageError", "Store", "StoredObject", "open_store"]

logger = logging.getLogger(__name__)

_PARTS_AT_ONCE = 4
_PAGE_ENTRIES = 1000  # the most that S3 allows

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Page(Generic[T]):
    """A page of a listing."""

    found: Sequence[T]
    more: dict[str, str]  # arguments that ask for the next page; empty in the last one


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """Size, hashes and time of an object, as the store reports them."""

    size: int
    sha256: str | None  # as noted by its writer; None if that was not this module
    etag: str
    written_ns: int = field(default=0, compare=False)
    """Time of the last write since 1970, in whole seconds."""


def open_store(location: str, *, timeout_seconds: float = 120.0) -> Store:
    """Return the store at `s3://bucket/prefix`, without any request to the server.

    The environment decides on the server, as for Streaming and Composer: S3_ENDPOINT_URL (none: AWS), and boto3's
    chain for the rest: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, profiles, roles. Buckets named in
    S3_PUBLIC_BUCKETS (separated by commas) are read without credentials; requests to those in
    S3_REQUESTER_PAYS_BUCKETS are paid by the reader.

    Args:
        timeout_seconds: see the module's docstring.

    Raises:
        LocationError: a location that is refused everywhere.
        StorageError: a local path, an endpoint that is no URL, or boto3 is not installed.
    """
    location = checked_location(location)
    if not is_remote(location):
        raise StorageError(f"{location}: not a place in object storage; write s3://bucket/prefix")
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    try:
        import boto3  # noqa: F401
    except ImportError:
        raise StorageError(
            f"{location}: boto3 is not installed, which object storage needs; run {install_command('s3')}"
        ) from None
    endpoint = os.environ.get("S3_ENDPOINT_URL") or None
    if endpoint is not None and not _is_address(endpoint):
        shown = endpoint.rpartition("@")[2].partition("?")[0]  # without a user name, password or signature
        raise StorageError(f"S3_ENDPOINT_URL: {shown!r} is no address; write http://HOST:PORT or https://HOST")
    connection = Connection(
        endpoint=endpoint,
        timeout_seconds=timeout_seconds,
        is_unsigned=bucket in _named_buckets("S3_PUBLIC_BUCKETS"),
        requester_pays=bucket in _named_buckets("S3_REQUESTER_PAYS_BUCKETS"),
    )
    return Store(bucket=bucket, prefix=prefix.strip("/"), timeout_seconds=timeout_seconds, _connection=connection)


def _is_address(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        is_plain = not (parts.query or parts.fragment)
        return is_plain and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that are not closed, or a port that is no number below 65,536
        return False


def _named_buckets(variable: str) -> set[str]:
    """Return the buckets that an environment variable names, also as s3://bucket.

    Raises:
        StorageError: it names anything else.
    """
    names = {name.strip() for name in os.environ.get(variable, "").split(",")} - {""}
    try:
        names = {checked_location(name).removeprefix("s3://").removesuffix("/") for name in names}
    except LocationError as error:
        raise StorageError(f"{variable}: {error}") from None
    if wrong := sorted(name for name in names if "/" in name or name == "*"):
        raise StorageError(f"{variable}: found {wrong[0]!r}; write names of buckets, with commas between them")
    return names


@dataclass(frozen=True, kw_only=True)
class Store:
    """Objects below a prefix of a bucket; names are relative to it. Safe to share among threads, pickle, and fork.

    Every method raises StorageError within the time that the module's docstring states.
    """

    bucket: str
    prefix: str
    timeout_seconds: float
    _connection: Connection = field(repr=False, compare=False)

    @property
    def location(self) -> str:
        return self.url().rstrip("/")

    def url(self, name: str = "") -> str:
        return f"s3://{self.bucket}/{self._key(name)}"

    def with_parents(self) -> Iterator[Store]:
        """Yield this store, then that of each prefix above it, up to its whole bucket."""
        parts = self.prefix.split("/") if self.prefix else []
        for length in range(len(parts), -1, -1):
            yield replace(self, prefix="/".join(parts[:length]))

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return the size in bytes, by name, of all objects whose names begin with `prefix`, sorted."""
        return {name: size for name, size, _ in sorted(self.walk(prefix))}

    def walk(self, prefix: str = "") -> Iterator[tuple[str, int, int]]:
        """Yield (name, bytes, time of writing in ns since 1970) of all objects whose names begin with `prefix`."""

        def entries(page: Any) -> _Page[tuple[str, int, int]]:
            begin, there = len(self._key("")), page.get("Contents", [])
            return _Page(
                found=[(entry["Key"][begin:], int(entry["Size"]), _written_ns(entry)) for entry in there],
                more={"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else {},
            )

        limit = {"MaxKeys": _PAGE_ENTRIES}
        for found in self._pages("list_objects_v2", self._key(prefix), entries, **limit):
            yield from found

    def find(self, name: str) -> StoredObject | None:
        """Return an object's record, or None where it or its bucket does not exist; `list` tells the difference."""
        try:
            return self._stored(name)
        except ObjectMissing:
            return None

    def check_writable(self) -> None:
        """Check that objects may be written here: begin an upload and abort it, so that no object becomes visible."""
        name = ".write-check"
        begun = self._ask("write", name, lambda client, _: client.create_multipart_upload(**self._at(name)))
        self._abort(self._key(name), begun["UploadId"])

    def put_file(self, path: str | Path, name: str, *, sha256: str) -> bool:
        """Upload a file and verify it; return False if the store already had the same content.

        Args:
            sha256: the file's hash when it was written: a file that was damaged since is not uploaded.
        """
        content = content_of_file(Path(path))
        if content.sha256 != sha256:
            raise StorageError(
                f"{path}: sha256 {content.sha256} is not the expected {sha256}: the file was changed or damaged "
                "on this machine; build it again"
            )
        return self._put(content, name)

    def put_bytes(self, content: bytes, name: str) -> bool:
        """Upload bytes and verify them; return False if the store already had them."""
        return self._put(content_of(len(content), lambda at, size: content[at : at + size]), name)

    def get_bytes(self, name: str, *, most: int, sha256: str | None = None) -> bytes:
        """Return the content of an object of at most `most` bytes, verified as by `get_file`."""
        content = io.BytesIO()
        self._get(name, content, sha256=sha256, most=most)
        return content.getvalue()

    def get_file(self, name: str, path: str | Path, *, most: int, sha256: str | None = None) -> None:
        """Download an object to `path`, which is replaced once the content is complete and verified.

        Args:
            most: the largest size that is fetched: the object may be anybody's, and the disk is the user's.
            sha256: the expected hash; by default the one noted by the object's writer, if any.
        """
        with atomic_file(Path(path), concurrent=True) as temporary, temporary.open("w+b") as file:
            self._get(name, file, sha256=sha256, most=most)

    def open(self, name: str, *, listed: tuple[int, int] | None = None) -> IO[bytes]:
        """Open an object as a seekable file that fetches only the parts being read: see `RemoteFile`.

        Reading raises StorageError once another object has replaced it.

        Args:
            listed: bytes and time of writing, as returned by `walk`; any other object is an error.
        """
        found = self._stored(name)
        if listed not in (None, (found.size, found.written_ns)):
            raise StorageError(f"{self.url(name)}: was replaced since it was listed; run the command again")

        def fetch(begin: int, end: int) -> bytearray:
            content = bytearray()
            self._fetch(name, content.extend, of=found, begin=begin, end=end)
            return content

        return io.BufferedReader(RemoteFile(fetch, size=found.size))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; missing ones are no error."""
        # DeleteObjects needs a checksum that older servers do not know.
        with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            list(pool.map(self._delete, names))

    def abort_unfinished(self, prefix: str = "") -> int:
        """Abort the multipart uploads that killed programs left below `prefix`; return their number.

        Uploads of a running program would be aborted too: only the program that writes here may call this. MinIO lists
        unfinished uploads by the full name of the object only; it removes them itself after a day.
        """
        return self._abort_unfinished(self._key(prefix))

    def close(self) -> None:
        """Close idle connections; the store can be used again."""
        self._connection.close()

    # --- uploads ---

    def _put(self, content: Content, name: str) -> bool:
        if self._holds(content, name):
            return False
        for attempt in ("first", "second"):
            if len(content.md5s) == 1:
                answer = self._put_part(content, 0, name, "put_object", Metadata={"sha256": content.sha256})
            else:
                answer = self._put_parts(content, name)
            if _etag(answer) == content.etag or self._holds(content, name):
                return True
            logger.warning("%s: not what was uploaded, on the %s attempt", self.url(name), attempt)
        raise StorageError(
            f"{self.url(name)}: uploaded twice, and the object still differs from what was sent (checksum); the "
            "server or something before it damages or replaces objects"
        )

    def _holds(self, content: Content, name: str) -> bool:
        found = self.find(name)
        if found is None or (found.size, found.sha256) != (content.size, content.sha256):
            return False
        return found.etag == content.etag or self._read_back(name) == content.sha256

    def _read_back(self, name: str) -> str:
        digest = hashlib.sha256()
        self._fetch(name, digest.update)
        return digest.hexdigest()

    def _put_parts(self, content: Content, name: str) -> Any:
        key = self._key(name)
        self._abort_unfinished(key)  # of an earlier run: no other program writes this object now
        begun = self._ask(
            "upload",
            name,
            lambda client, _: client.create_multipart_upload(**self._at(name), Metadata={"sha256": content.sha256}),
        )
        upload = {"UploadId": begun["UploadId"]}
        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                try:
                    numbers = range(len(content.md5s))
                    parts = pool.map(
                        lambda n: self._put_part(content, n, name, "upload_part", PartNumber=n + 1, **upload), numbers
                    )
                    etags = [part["ETag"] for part in parts]
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            whole = {"Parts": [{"ETag": etag, "PartNumber": n + 1} for n, etag in enumerate(etags)]}
            try:
                return self._ask(
                    "complete",
                    name,
                    lambda client, _: client.complete_multipart_upload(
                        **self._at(name), **upload, MultipartUpload=whole
                    ),
                )
            except UploadMissing:  # already completed, but the answer was lost
                return {}
        except BaseException:
            with contextlib.suppress(StorageError):
                self._abort(key, begun["UploadId"])
            raise

    def _put_part(self, content: Content, number: int, name: str, operation: str, **arguments: Any) -> Any:
        body = content.read(number * content.part_bytes, content.part_bytes)
        arguments |= self._at(name)
        arguments["ContentMD5"] = base64.b64encode(content.md5s[number]).decode()

        def attempt(client: Any, moved: Moved) -> Any:
            return getattr(client, operation)(Body=CountedBody(body, moved), **arguments)

        return self._ask("upload", name, attempt)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(ObjectMissing):
            self._ask("delete", name, lambda client, _: client.delete_object(**self._at(name)))

    def _abort_unfinished(self, key_prefix: str) -> int:
        aborted = 0

        def uploads(page: Any) -> _Page[tuple[str, str]]:
            found = [(upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", [])]
            if not page.get("IsTruncated"):
                return _Page(found=found, more={})
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}
            return _Page(found=found, more=markers)

        limit = {"MaxUploads": _PAGE_ENTRIES}
        for found in self._pages("list_multipart_uploads", key_prefix, uploads, **limit):
            for key, upload_id in found:
                self._abort(key, upload_id)
            aborted += len(found)
        return aborted

    def _abort(self, key: str, upload_id: str) -> None:
        with contextlib.suppress(UploadMissing):
            self._ask(
                "abort an upload of",
                "",
                lambda client, _: client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id),
            )

    # --- downloads ---

    def _get(self, name: str, file: IO[bytes], *, sha256: str | None, most: int) -> None:
        for attempt in ("first", "second"):
            file.seek(0)
            file.truncate()
            digest = hashlib.sha256()

            def write(block: bytes, digest: Any = digest) -> None:
                file.write(block)
                digest.update(block)

            found = self._fetch(name, write, most=most)
            expected = sha256 or found.sha256
            if expected in (None, digest.hexdigest()):
                return
            logger.warning("%s: damaged on the %s attempt (%d bytes)", self.url(name), attempt, found.size)
        raise StorageError(
            f"{self.url(name)}: fetched twice, and its checksum (sha256) is not the expected {expected}; the object is "
            "damaged: restore it, or write it again"
        )

    def _fetch(
        self,
        name: str,
        write: Callable[[bytes], Any],
        *,
        of: StoredObject | None = None,
        begin: int = 0,
        end: int | None = None,
        most: int | None = None,
    ) -> StoredObject:
        """Pass an object's bytes to `write` as they arrive, and resume after an interruption; return its record.

        Args:
            of: the expected object; any other is an error. Required to read a part.
            begin, end: the part to read; by default all.
        """
        at = begin

        def attempt(client: Any, moved: Moved) -> StoredObject:
            nonlocal at, of
            last = "" if end is None else end - 1
            part = {"Range": f"bytes={at}-{last}", "IfMatch": f'"{of.etag}"'} if of else {}
            with _well_formed():
                answer = client.get_object(**self._at(name), **part)
                found = of or _stored(answer)
            with contextlib.closing(answer["Body"]) as body:
                if of is not None and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                    raise FaultyAnswer("the whole object came where a part was asked for")
                if most is not None and found.size > most:
                    raise StorageError(f"{self.url(name)}: {found.size:,} bytes; at most {most:,} are expected here")
                stop = found.size if end is None else end
                while block := body.read(STEP_BYTES):
                    if at + len(block) > stop:
                        raise FaultyAnswer(f"more than the {stop - begin:,} bytes came that were asked for")
                    with moved.lock:
                        if moved.abandoned:  # the next attempt continues in its place
                            raise FaultyAnswer("given up")
                        write(block)
                        at, of = at + len(block), found
                        moved.bytes += len(block)
            if at != stop:
                raise FaultyAnswer(f"{at - begin:,} of {stop - begin:,} bytes came")
            return found

        return self._ask("read", name, attempt, gained=lambda: at)

    # --- requests ---

    def _stored(self, name: str) -> StoredObject:
        def look(client: Any, _: Moved) -> StoredObject:
            with _well_formed():
                return _stored(client.head_object(**self._at(name)))

        return self._ask("look for", name, look)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._key(name)}

    def _pages(
        self, operation: str, key_prefix: str, read: Callable[[Any], _Page[T]], **limit: int
    ) -> Iterator[Sequence[T]]:
        """Yield what `read` finds in each page of a listing."""
        more: dict[str, str] = {}
        asked: set[tuple[str, ...]] = set()

        def page(client: Any, _: Moved) -> _Page[T]:
            with _well_formed():
                answer = read(getattr(client, operation)(Bucket=self.bucket, Prefix=key_prefix, **limit, **more))
            if tuple(answer.more.values()) in asked:
                raise FaultyAnswer("the pages of its listing have no end")
            return answer

        while True:
            answer = self._ask("list", "", page)
            yield answer.found
            if not answer.more:
                return
            more = answer.more
            asked.add(tuple(more.values()))

    def _ask(
        self, verb: str, name: str, call: Callable[[Any, Moved], T], *, gained: Callable[[], int] = lambda: 0
    ) -> T:
        return self._connection.ask(call, url=self.url(name).rstrip("/"), verb=verb, gained=gained)


@contextlib.contextmanager
def _well_formed() -> Iterator[None]:
    """Raise an error about an answer's fields, of this module or of botocore, as one of the server."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FaultyAnswer(f"its answer is not one of S3 ({type(error).__name__}: {error})") from None


def _stored(answer: Any) -> StoredObject:
    return StoredObject(
        size=answer["ContentLength"],
        sha256=answer["Metadata"].get("sha256"),
        etag=_etag(answer),
        written_ns=_written_ns(answer),
    )


def _written_ns(answer: Any) -> int:
    return int(answer["LastModified"].timestamp()) * 10**9  # only listings have fractions of a second


def _etag(answer: Any) -> str:
    return str(answer.get("ETag", "")).strip('"')
