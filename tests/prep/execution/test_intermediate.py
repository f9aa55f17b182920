"""Intermediate files that were cut off are named in an error, with all options of Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prep.execution.intermediate import (
    COLUMNS,
    HashedFile,
    SortedPieces,
    read_block,
    read_hashes,
    write_blocks,
    write_hashes,
)
from prep.execution.task_store import WorkError


def test_a_block_is_read_as_written_and_a_short_file_is_named(tmp_path: Path) -> None:
    columns = {name: np.array([3, 2], dtype) for name, dtype in COLUMNS.items()}
    pieces = SortedPieces(bounds=np.array([0, 2]), columns=columns, tokens=np.arange(5, dtype=np.uint16))
    with HashedFile(tmp_path / "pieces.bin") as file:
        (block,) = write_blocks([pieces], file)
    whole = (tmp_path / "pieces.bin").read_bytes()
    assert len(whole) == 2 * 24 + 5 * 2  # four columns of 4 bytes and one of 8, for two pieces; five tokens of 2
    tokens = np.zeros(5, np.uint16)
    with (tmp_path / "pieces.bin").open("rb") as file:
        assert read_block(file, block, tokens_into=tokens)["lengths"].tolist() == [3, 2]
    assert tokens.tolist() == [0, 1, 2, 3, 4]
    for size in (len(whole) - 1, 48, 47, 0):
        (tmp_path / "pieces.bin").write_bytes(whole[:size])
        with (
            (tmp_path / "pieces.bin").open("rb") as file,
            pytest.raises(WorkError, match=r"pieces\.bin: is shorter than"),
        ):
            read_block(file, block, tokens_into=tokens)


def test_runs_of_hashes_are_read_as_written_and_a_short_file_is_named(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "hashes.bin") as file:
        count = write_hashes(np.array([[7, 1], [5, 2]], np.uint64), np.array([0, 1], np.uint32), file)
    ((hashes, documents),) = read_hashes(tmp_path / "hashes.bin", [count])
    assert (hashes.tolist(), documents.tolist()) == ([[5, 2], [7, 1]], [1, 0])
    (tmp_path / "hashes.bin").write_bytes((tmp_path / "hashes.bin").read_bytes()[:-1])
    with pytest.raises(WorkError, match=r"hashes\.bin: is shorter than"):
        list(read_hashes(tmp_path / "hashes.bin", [count]))
