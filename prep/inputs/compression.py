"""Decompression of input files in bounded memory, with an error where a file is damaged or cut off."""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable, Iterator
from typing import IO

import zstandard
from isal import igzip, igzip_lib

_READ_BYTES = 1 << 20
_FIRST_FRAME_BYTES = 1 << 12  # of a zstd frame; the step is doubled as the frame continues
_MOST_FRAME_BYTES = 1 << 14  # four bytes can expand to 128 KiB, so this limits a step to 512 MiB
_MEMBER_BYTES = 1 << 16  # of a bzip2 or xz file; the bytes after the end of a member are copied
_MOST_WINDOW_BYTES = 1 << 31


class CompressionError(Exception):
    """A compressed file is damaged, cut off, or in another format."""


def decompressed(raw: IO[bytes], compression: str) -> Iterator[bytes]:
    """Yield the content in blocks; concatenated compressed files are read as one.

    Args:
        compression: `.gz`, `.zst`, `.bz2` or `.xz`.

    Raises:
        CompressionError: the file is damaged or cut off.
    """
    match compression:
        case ".gz":
            return _gzip_blocks(raw)
        case ".zst":
            return _zstd_blocks(raw)
        case ".bz2":
            return _member_blocks(raw, bz2.BZ2Decompressor, kind="bzip2")
        case ".xz":
            return _member_blocks(raw, _xz_decompressor, kind="xz")
        case _:
            raise AssertionError(compression)


def _gzip_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    try:
        with igzip.IGzipFile(fileobj=raw) as stream:
            while block := stream.read(_READ_BYTES):
                yield block
    except (EOFError, OSError, igzip_lib.IsalError) as error:  # type: ignore[misc]  # isal's stub has no class
        raise CompressionError(f"broken gzip ({error})") from None


def _zstd_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    # Not `stream_reader`: it does not report a file that is cut off.
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW_BYTES)
    frame, step = decompressor.decompressobj(), 0
    is_within = False
    found: list[bytes] = []
    size = 0
    try:
        while block := raw.read(_READ_BYTES):
            content, at = memoryview(block), 0
            while at < len(content):
                # Bytes after a frame's end come back as a copy, so steps are short in a file of many small frames.
                step = min(2 * step, _MOST_FRAME_BYTES) if is_within else _FIRST_FRAME_BYTES
                frame = frame if is_within else decompressor.decompressobj()
                piece = content[at : at + step]
                found.append(frame.decompress(piece))
                at += len(piece) - len(frame.unused_data)
                is_within = not frame.eof
                size += len(found[-1])
                if size >= _READ_BYTES:
                    yield b"".join(found)
                    found, size = [], 0
    except zstandard.ZstdError as error:
        raise CompressionError(f"broken zstd ({error})") from None
    yield b"".join(found)
    if is_within:
        raise CompressionError("broken zstd (it ends within a frame)")


def _xz_decompressor() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_WINDOW_BYTES)


def _member_blocks(
    raw: IO[bytes], new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], *, kind: str
) -> Iterator[bytes]:
    # Not `bz2.open` or `lzma.open`: they ignore damaged data after the first member.
    content = raw.read(_MEMBER_BYTES)
    try:
        while content:
            member = new()
            while not member.eof:
                if member.needs_input:
                    content = content or raw.read(_MEMBER_BYTES)
                    if not content:
                        raise CompressionError(f"broken {kind} (it ends within a member)")
                if block := member.decompress(content, _READ_BYTES):
                    yield block
                content = b""
            content = member.unused_data or raw.read(_MEMBER_BYTES)
            if kind == "xz":  # members may be padded with zeros
                while content and not content.strip(b"\0"):
                    content = raw.read(_MEMBER_BYTES)
                content = content.lstrip(b"\0")
    except (OSError, lzma.LZMAError) as error:
        raise CompressionError(f"broken {kind} ({error})") from None
