"""Readers: parts of files to documents, and reads that fail."""

from __future__ import annotations

import errno
import gzip
import io
import os

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from prep.config import SourceConfig
from prep.inputs.discovery import find_files
from prep.inputs.files import Part
from prep.inputs.readers import read_part
from streaming_rwkv.config import UserError
from tests.prep.inputs.reading import lines, write_parquet


def test_a_part_can_be_read_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("one"))
    (file,) = find_files("s", [str(tmp_path)])
    (batch,) = read_part(Part(file=file), SourceConfig(paths=["x"]))
    assert (batch.texts, batch.rows.tolist(), batch.characters) == (["one"], [0], 3)


class FailingFile(io.FileIO):
    """A disk that can only read the first and the last 64 KiB of a file."""

    def readinto(self, buffer):
        if 1 << 16 <= self.tell() < os.fstat(self.fileno()).st_size - (1 << 16):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(memoryview(buffer)[: 1 << 15])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_failing_disk_is_not_reported_as_a_broken_file(tmp_path, monkeypatch, name):
    texts = [np.random.default_rng(row).bytes(2000).hex() for row in range(400)]
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(name.rpartition(".")[2], bytes)
    if name == "a.parquet":
        write_parquet(tmp_path / name, pa.array(texts), row_group_size=10)
    else:
        (tmp_path / name).write_bytes(compress(lines(*texts)))
    (file,) = find_files("s", [str(tmp_path / name)])
    source = SourceConfig(paths=["x"])
    part = Part(file=file, row_groups=tuple(range(40)) if name == "a.parquet" else None)
    whole = [text for batch in read_part(part, source) for text in batch.texts]
    assert whole == texts
    monkeypatch.setattr("prep.inputs.files._open_unbuffered", FailingFile)
    wanted = (
        r"cannot be read \(Input/output error\); finished work is kept, run the same command again once it can be read"
    )
    with pytest.raises(UserError, match=wanted) as caught:
        list(read_part(part, source))
    assert str(caught.value).startswith(f"{tmp_path / name}: cannot")
