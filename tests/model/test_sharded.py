"""Sharded checkpoints without a completion mark: their index is checked before torch relies on it."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from streaming_rwkv.inference.average import average
from streaming_rwkv.model.marked_files import CheckpointError
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.sharded_index import read_index
from streaming_rwkv.model.state import model_state
from streaming_rwkv.model.weights import read_model

Build = Callable[..., RWKV7]


@pytest.fixture
def sharded(random_model: Build, tmp_path: Path) -> Path:
    weights = {name: value.clone() for name, value in model_state(random_model()).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own: one process saves, and its TypedStorage is deprecated
        dcp.save({"model": weights}, checkpoint_id=tmp_path / "sharded", no_dist=True)
    return tmp_path / "sharded"


def change_index(folder: Path, change: Callable[[Any], None]) -> None:
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def test_a_shard_that_is_cut_off_or_missing_is_named(sharded: Path):
    (shard,) = sharded.glob("*.distcp")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        CheckpointError, match=rf"{shard.name} has {len(content) // 2} bytes, expected \d+: it is cut off"
    ):
        read_model(sharded)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"the file '{shard.name}' is missing"):
        read_model(sharded)


def test_a_shard_with_other_bytes_is_named(sharded: Path):
    (shard,) = sharded.glob("*.distcp")
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        read_model(sharded)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("relative_path", "/dev/zero", "names the file '/dev/zero', expected one in this folder"),
        ("relative_path", "../../../../etc/passwd", "names the file '../../../../etc/passwd', expected one in this"),
        ("relative_path", "..", "names the file '..', expected one in this folder"),
        ("relative_path", 7, "names the file 7, expected one in this folder"),
        ("offset", -1, "bytes from -1 on in .*, expected whole numbers"),
        ("length", "9", "'9' bytes from .*, expected whole numbers"),
        ("length", 1 << 60, "it is cut off"),
    ],
)
def test_an_index_that_places_a_tensor_outside_its_files_is_refused(
    field: str, value: object, error: str, sharded: Path
):
    change_index(sharded, lambda metadata: setattr(next(iter(metadata.storage_data.values())), field, value))
    with pytest.raises(CheckpointError, match=error):
        read_model(sharded)


def test_an_index_with_larger_tensors_than_the_files_is_refused(sharded: Path):
    def enlarge(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["model.emb.weight"]
        entry.size = entry.chunks[0].sizes = torch.Size([1 << 40, 128])

    change_index(sharded, enlarge)
    with pytest.raises(CheckpointError, match=r"has \d+ bytes of weights, the files have \d+"):
        read_model(sharded)


def test_an_index_without_places_is_refused(sharded: Path):
    change_index(sharded, lambda metadata: setattr(metadata, "storage_data", None))
    with pytest.raises(CheckpointError, match="storage_data is a NoneType, expected a mapping"):
        read_model(sharded)


def _of(metadata: Any, name: str = "model.emb.weight") -> Any:
    return metadata.state_dict_metadata[name]


def _piece(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda index: setattr(_of(index), "size", None), r"damaged \(TypeError: a size of model.emb.weight is a None"),
        (lambda index: setattr(_of(index), "size", "x"), "has the size or place"),
        (lambda index: setattr(_of(index), "size", (-1, 128)), r"the size or place \(-1, 128\), expected numbers from"),
        (lambda index: setattr(_of(index), "chunks", []), "of which its 0 pieces are not exactly all"),
        (lambda index: setattr(_of(index), "chunks", None), "damaged .TypeError"),
        (lambda index: setattr(_of(index), "properties", None), "damaged .AttributeError"),
        (lambda index: setattr(_of(index).properties, "dtype", torch.int64), "is torch.int64, expected float32"),
        (lambda index: setattr(_of(index).properties, "dtype", torch.complex64), "is torch.complex64, expected"),
        (lambda index: setattr(index, "state_dict_metadata", []), "is a list, expected a mapping"),
        (lambda index: setattr(index, "storage_meta", 5), "storage_meta is a int"),
        (lambda index: index.storage_data.clear(), "does not say where the piece of model.emb.weight at .0, 0. is"),
        (
            lambda index: [setattr(p, "transform_descriptors", ["zstd"]) for p in index.storage_data.values()],
            r"is transformed \(compressed, perhaps\)",
        ),
    ],
)
def test_an_index_that_is_not_valid_is_refused(change: Callable[[Any], None], error: str, sharded: Path):
    change_index(sharded, change)
    for read in (read_model, lambda folder: average([folder], [1.0])):
        with pytest.raises(CheckpointError, match=error):
            read(sharded)


@pytest.mark.parametrize(
    ("pieces", "is_whole"),
    [
        ([((0, 0), (4, 6))], True),
        ([((2, 0), (2, 6)), ((0, 0), (2, 6))], True),
        ([((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 6)), ((4, 0), (0, 6))], True),
        ([((0, 0), (2, 6))], False),  # torch would leave the rest as it was in memory
        ([((0, 0), (2, 6)), ((0, 0), (2, 6))], False),
        ([((0, 0), (3, 6)), ((2, 0), (2, 6))], False),
        ([((0, 0), (4, 7))], False),
        ([((0,), (4,))], False),
        ([((0, 0), (3, 4)), ((3, 0), (1, 4)), ((0, 4), (1, 2)), ((0, 4), (3, 2))], False),
    ],
)
def test_the_pieces_of_a_tensor_are_all_of_it_once(pieces: Any, is_whole: bool, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"x": torch.zeros(4, 6)}, checkpoint_id=tmp_path / "x", no_dist=True)

    def cut(index: Any) -> None:
        _of(index, "x").chunks = [_piece(*piece) for piece in pieces]
        (place,) = index.storage_data.values()
        index.storage_data = {MetadataIndex("x", offsets): place for offsets, _ in pieces}

    change_index(tmp_path / "x", cut)
    if is_whole:
        assert read_index(tmp_path / "x").state_dict_metadata["x"].size == (4, 6)
    else:
        with pytest.raises(ValueError, match=rf"x is \(4, 6\), of which its {len(pieces)} pieces are not exactly all"):
            read_index(tmp_path / "x")


class _Zeros:
    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return (bytearray, (self.size,))


def _replace_piece(folder: Path, content: bytes) -> None:
    (shard,) = folder.glob("*.distcp")
    size = shard.stat().st_size

    def change(index: Any) -> None:
        place = index.storage_data[MetadataIndex("model.emb.weight", (0, 0))]
        place.offset, place.length = size, len(content)

    change_index(folder, change)
    with shard.open("ab") as file:
        file.write(content)


def test_a_piece_that_would_take_more_memory_than_its_file_is_refused(sharded: Path):
    file = io.BytesIO()
    torch.save(_Zeros(1 << 44), file)
    _replace_piece(sharded, file.getvalue())
    for read in (read_model, lambda folder: average([folder], [1.0])):
        with pytest.raises(CheckpointError, match=r"it asks for \w+\.bytearray, which is in no weights"):
            read(sharded)


def test_a_compressed_piece_is_refused(sharded: Path):
    stored, compressed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(97, 128), stored)
    with zipfile.ZipFile(stored) as before, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
    _replace_piece(sharded, compressed.getvalue())
    with pytest.raises(CheckpointError, match="in it is compressed, which torch never does"):
        read_model(sharded)
