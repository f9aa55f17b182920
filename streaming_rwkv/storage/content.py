"""Content to upload, with the checksums that requests and objects carry."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streaming_rwkv.storage.requests import Moved

PART_BYTES = 1 << 24
"""Size of the parts of large files; R2 wants all but the last equal, AWS at least 5 MiB and at most 10,000."""
_MOST_PARTS = 10_000


@dataclass(frozen=True, kw_only=True)
class Content:
    """Content to upload, with the checksums of the whole and of each part."""

    size: int
    sha256: str
    part_bytes: int
    md5s: list[bytes]
    read: Callable[[int, int], bytes]

    @property
    def etag(self) -> str:
        """Return the ETag of S3 servers: the MD5, or the MD5 of the parts' MD5s with the number of parts."""
        if len(self.md5s) == 1:
            return self.md5s[0].hex()
        return f"{hashlib.md5(b''.join(self.md5s), usedforsecurity=False).hexdigest()}-{len(self.md5s)}"


def content_of(size: int, read: Callable[[int, int], bytes]) -> Content:
    """Describe content of `size` bytes; `read` returns the bytes from an offset on, at most as many as asked for."""
    part_bytes = max(PART_BYTES, -(-size // _MOST_PARTS))
    sha256 = hashlib.sha256()
    md5s = []
    for at in range(0, max(size, 1), part_bytes):
        part = read(at, part_bytes)
        sha256.update(part)
        md5s.append(hashlib.md5(part, usedforsecurity=False).digest())
    return Content(size=size, sha256=sha256.hexdigest(), part_bytes=part_bytes, md5s=md5s, read=read)


def content_of_file(path: Path) -> Content:
    """Describe a file, which is read a part at a time."""

    def read(at: int, size: int) -> bytes:
        with path.open("rb") as file:
            file.seek(at)
            return file.read(size)

    return content_of(path.stat().st_size, read)


class CountedBody(io.BytesIO):
    """A body that is sent in blocks: with plain bytes, one socket timeout would apply to the whole body."""

    def __init__(self, content: bytes, moved: Moved) -> None:
        super().__init__(content)
        self._moved = moved

    def read(self, size: int | None = -1, /) -> bytes:
        block = super().read(size)
        self._moved.bytes += len(block)
        return block
