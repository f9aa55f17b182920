"""Pickles are followed before they are loaded: small files that would become large, or never end, are refused."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from streaming_rwkv.inference.average import average
from streaming_rwkv.model.marked_files import CheckpointError
from streaming_rwkv.model.pickles import check_pickle, latin1, small
from streaming_rwkv.model.weights import read_model


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def archive(path: Path, pickled: bytes) -> Path:
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", pickled, len(pickled))
    writer.write_record("byteorder", b"little", 6)
    writer.write_end_of_file()
    return path


TENSOR = b"ctorch\nTensor\nJ" + struct.pack("<i", 300_000_000) + b"\x85R"
HEX = b"c_codecs\nencode\n" * 36 + text("a" * 1000) + text("utf-8") + b"\x86R" + (text("hex") + b"\x86R") * 35
PUNYCODE = b"c_codecs\nencode\n" + text("\u4e00\u4e01" * 50_000) + text("punycode") + b"\x86R"


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (HEX, "encodes a text otherwise than as bytes"),
        (PUNYCODE, "encodes a text otherwise than as bytes"),
        (b"cbuiltins\nset\n" + TENSOR + b"\x85R", r"it asks for builtins\.set, which is in no weights"),
        (b"c__builtin__\nset\n" + TENSOR + b"\x85R", r"it asks for __builtin__\.set, which is in no weights"),
        (b"ccollections\nCounter\n" + TENSOR + b"\x85R", r"it asks for collections\.Counter, which is in no weights"),
        (b"ctorch\nSize\n" + TENSOR + b"\x85R", r"it asks for torch\.Tensor, which is in no weights"),
        (b"]r" + struct.pack("<I", 1 << 29), "has place 536,870,912 in a memo of 0"),
    ],
    ids=["hex", "punycode", "set", "old set", "counter", "size", "memo"],
)
def test_a_file_that_would_become_large_is_refused(value: bytes, error: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pth", b"\x80\x02}" + text("emb.weight") + value + b"s.")
    with pytest.raises(CheckpointError, match=error):
        read_model(path)


def follow(pickled: bytes) -> None:
    calls = {"torch.Size": small, "_codecs.encode": latin1}
    check_pickle(io.BytesIO(pickled), calls, names=lambda name: False)


def mapping_with_key_of_tuples(depth: int) -> bytes:
    """A tuple that has one tuple twice, which has another twice, and so on; it takes few bytes, and is long to hash."""
    key = b"K\x01q\x00" + b"".join(b"h%c\x86q%c" % (place, place + 1) for place in range(depth))
    return b"\x80\x02}" + key + b"K\x01s."


def test_a_key_of_tuples_that_share_their_members_is_refused() -> None:
    assert pickle.loads(mapping_with_key_of_tuples(1)) == {(1, 1): 1}
    follow(mapping_with_key_of_tuples(5))
    with pytest.raises(ValueError, match="a key with more than 1000 values"):
        follow(mapping_with_key_of_tuples(40))


def test_nothing_is_added_to_a_value_that_is_in_another() -> None:
    """A key could be small when it is made of an object, and long to hash when more is added to the object."""
    with pytest.raises(ValueError, match="adds to a value that is in another already"):
        follow(b"\x80\x02]q\x00h\x00\x85q\x01h\x00K\x01a.")


@pytest.mark.parametrize(
    "pickled",
    [b"R.", b"(R.", b"K\x01K\x01R.", b"h\x05.", b"K\x01K\x01a.", b"ctorch\nSize\nK\x01R.", b"t.", b"0.", b"K\x010."],
)
def test_a_damaged_pickle_is_refused(pickled: bytes) -> None:
    with pytest.raises(ValueError, match="its pickle"):
        follow(b"\x80\x02" + pickled)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_of_any_size_are_followed(protocol: int) -> None:
    value: Any = {"a": [1, 2.5, None, True, (1, 2, 3, 4), b"bytes"] * 100, 7: {"b": "x" * 1000}, (1, "two"): -(1 << 70)}
    value["again"] = value["a"]
    follow(pickle.dumps(value, protocol=protocol))


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (b"}r" + struct.pack("<I", 0x27FFFFFF), "has place 671,088,639 in a memo of 0"),
        (
            b"](cpathlib\nPosixPath\nq\x00" + text("a") + b"\x85Rq\x01h\x00h\x01h\x01\x86Re",
            "has a call with other values than texts",
        ),
    ],
    ids=["memo", "path"],
)
def test_an_index_that_would_become_large_is_refused(index: bytes, error: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + index + b".")
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    for read in (read_model, lambda folder: average([folder], [1.0])):
        with pytest.raises(CheckpointError, match=error):
            read(tmp_path)
