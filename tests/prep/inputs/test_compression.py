"""Compressed input: whole, in several members, damaged, and far larger than its file."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable

import pytest
import zstandard

from prep.inputs.compression import CompressionError, decompressed

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
every = pytest.mark.parametrize("compression", COMPRESS)


def read(content: bytes, compression: str) -> bytes:
    return b"".join(decompressed(io.BytesIO(content), compression))


@every
def test_several_members_are_one_file(compression):
    compress = COMPRESS[compression]
    texts = [b"one\n", b"", b"two\n" * 100_000, b"three"]
    assert read(b"".join(map(compress, texts)), compression) == b"".join(texts)


@every
def test_a_file_that_is_cut_off_anywhere_is_an_error(compression):
    content = COMPRESS[compression](bytes(range(256)) * 4) + COMPRESS[compression](b"two")
    whole = len(COMPRESS[compression](bytes(range(256)) * 4))
    for end in range(1, len(content)):
        if end != whole:
            with pytest.raises(CompressionError, match="broken"):
                read(content[:end], compression)


@every
def test_bytes_after_the_last_member_are_an_error(compression):
    with pytest.raises(CompressionError, match="broken"):
        read(COMPRESS[compression](b"one") + b"something else", compression)


@every
def test_damage_is_an_error(compression):
    content = bytearray(COMPRESS[compression](bytes(range(256)) * 400))
    content[len(content) // 2] ^= 0xFF
    if compression == ".zst":
        content = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(bytes(range(256)) * 400))
        content[-6] ^= 0xFF
    with pytest.raises(CompressionError, match="broken"):
        read(bytes(content), compression)


def test_zeros_between_and_behind_members_of_xz_are_padding():
    padding = bytes(100_000)
    assert read(lzma.compress(b"one") + padding + lzma.compress(b"two") + padding, ".xz") == b"onetwo"


@every
def test_content_is_read_in_pieces_from_a_small_file_too(compression):
    size = 64 << 20
    content = COMPRESS[compression](bytes(size))
    if compression == ".zst":
        # The window stays open, so the file is many steps long.
        content = zstandard.compress(bytes(range(256)) * 4096) + content
    sizes = [len(block) for block in decompressed(io.BytesIO(content), compression)]
    assert sum(sizes) == size + (1 << 20) * (compression == ".zst")
    assert max(sizes) <= (64 << 20 if compression == ".zst" else 1 << 20)


def test_a_zstd_frame_with_a_huge_ratio_is_read_in_bounded_pieces():
    block_bytes = 1 << 17
    rle_block = ((block_bytes << 3) | 0b010).to_bytes(3, "little") + b"a"  # not the last; repeats one byte
    last_block = ((block_bytes << 3) | 0b011).to_bytes(3, "little") + b"a"
    header = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(17 - 10) << 3])  # no checksum, no size; a window of 128 KiB
    raw_block = ((block_bytes << 3) | 0b000).to_bytes(3, "little") + bytes(block_bytes)
    content = header + raw_block * 8 + rle_block * 8191 + last_block  # 1 MiB as it is, then 1 GiB in 32 KiB
    sizes = [len(block) for block in decompressed(io.BytesIO(content), ".zst")]
    assert sum(sizes) == (8 + 8192) * block_bytes
    assert max(sizes) <= (1 << 29) + (2 << 20)
