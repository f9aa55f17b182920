"""RWKV-LM's `.bin/.idx`: ids to texts, and the faults of such files."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from prep.build import build
from prep.config import SourceConfig
from prep.inputs.faults import InputError
from prep.inputs.hooks import source_identity
from prep.inputs.readers import read_unit
from prep.inputs.units import plan_units
from streaming_rwkv.config import UserError
from streaming_rwkv.shards import MANIFEST_NAME
from streaming_rwkv.tokenizer import load_tokenizer
from tests.prep.inputs.reading import read

TEXTS = ["the quick brown fox", "", "床前明月光，疑是地上霜。", "a real � sign", "def f(x):\n    return x\n" * 30, "😀"]


def write_ids(file: Path, documents: Sequence[Sequence[int]], *, code: int = 8, dtype: str = "<u2") -> Path:
    """Write x.idx and x.bin as RWKV-LM's make_data.py does, and return x.idx."""
    sizes = [len(document) for document in documents]
    pointers = np.cumsum([0, *sizes])[:-1] * np.dtype(dtype).itemsize
    file.with_suffix(".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(sizes), len(sizes) + 1)
        + np.array(sizes, "<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    )
    ids = [np.array(document, dtype).tobytes() for document in documents]
    file.with_suffix(".bin").write_bytes(b"".join(ids))
    return file.with_suffix(".idx")


def encoded(texts: Sequence[str], tokenizer: str | Path = "rwkv-world") -> list[list[int]]:
    loaded = load_tokenizer(tokenizer)
    return [[*loaded.encode(text).tolist(), loaded.eos_id] for text in texts]


@pytest.mark.parametrize("unit_bytes", [1, 40, 1 << 20])
def test_ids_become_texts_again_however_the_file_is_divided(tmp_path, unit_bytes):
    index = write_ids(tmp_path / "a", encoded(TEXTS))
    expected = (list(enumerate(TEXTS)), [])
    assert read(index, tokenizer="rwkv-world", unit_bytes=unit_bytes) == expected


def test_units_are_of_about_one_size(tmp_path):
    index = write_ids(tmp_path / "a", [[300, 0]] * 100)
    source = SourceConfig(paths=[str(index)], tokenizer="rwkv-world")
    units = plan_units({"s": source}, unit_bytes=100)
    assert [(unit.parts[0].first_row, unit.parts[0].rows, unit.input_bytes) for unit in units] == [
        (0, 25, 100), (25, 25, 100), (50, 25, 100), (75, 25, 100)
    ]  # fmt: skip
    assert len({unit.name for unit in units}) == 4


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_each_integer_type_is_read(tmp_path, code, dtype):
    index = write_ids(tmp_path / "a", [[ord("a") + 1, 0]], code=code, dtype=dtype)
    assert read(index, tokenizer="rwkv-world") == ([(0, "a")], [])


@pytest.mark.parametrize("tokenizer", ["rwkv-world", None])
def test_the_data_set_is_that_of_the_json_lines(config, tokenizer_folder, tmp_path, write_lines, tokenizer):
    texts = [f"{text} {number}" for number in range(40) for text in TEXTS]
    write_lines(tmp_path / "a.jsonl", texts)
    index = write_ids(tmp_path / "a", encoded(texts, tokenizer or tokenizer_folder), code=4, dtype="<i4")
    of_ids = {"paths": str(index)} | ({"tokenizer": tokenizer} if tokenizer else {})
    sets = {
        "lines": build(config(out=str(tmp_path / "lines"), sources={"s": {"paths": str(tmp_path / "a.jsonl")}})),
        "ids": build(config(out=str(tmp_path / "ids"), sources={"s": of_ids}, unit_bytes=1000)),
    }
    lines, ids = (
        {
            str(file.relative_to(tmp_path / name)): file.read_bytes()
            for file in sorted((tmp_path / name).rglob("*"))
            if file.is_file() and file.name != MANIFEST_NAME and ".prep" not in file.parts
        }
        for name in sets
    )
    assert lines == ids
    assert any(name.endswith(".mds.zstd") for name in lines)
    assert sets["lines"].manifest.streams == sets["ids"].manifest.streams
    assert sets["ids"].manifest.counts["s"].documents == {"train": 240, "validation": 0}


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([300, 0, 301, 0], "ids have bos or eos inside"),
        ([300, 0, 0], "ids have bos or eos inside"),
        ([65535, 0], "ids without text"),
        ([1 + 0xE5, 0], "invalid UTF-8"),
    ],
)
def test_a_document_that_is_no_text_is_broken(tmp_path, ids, reason):
    index = write_ids(tmp_path / "a", [[300, 0], ids])
    assert read(index, tokenizer="rwkv-world")[1] == [(1, reason)]


def test_a_document_without_an_end_is_read(tmp_path):
    index = write_ids(tmp_path / "a", [[ord("a") + 1], []])
    assert read(index, tokenizer="rwkv-world") == ([(0, "a"), (1, "")], [])


def test_hooks_receive_the_text(tmp_path, monkeypatch):
    (tmp_path / "hook_on_ids.py").write_text("def upper(record): return record['body'].upper()\n")
    monkeypatch.syspath_prepend(tmp_path)
    index = write_ids(tmp_path / "a", encoded(["abc"]))
    assert read(index, tokenizer="rwkv-world", text="body", transform="hook_on_ids:upper") == ([(0, "ABC")], [])


def _index(*, magic=b"MMIDIDX\0\0", version=1, code=8, sizes=(2, 2), pointers=(0, 4), documents=(0, 1, 2)) -> bytes:
    header = struct.pack("<9sQBQQ", magic, version, code, len(sizes), len(documents))
    arrays = np.array(sizes, "<i4"), np.array(pointers, "<i8"), np.array(documents, "<i8")
    return header + b"".join(array.tobytes() for array in arrays)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a.idx: begins with b'', expected b'MMIDIDX"),
        (b"\xfftOc" + b"\0" * 60, r"a.idx: begins with b'\\xfftOc.* it is no index of RWKV-LM's"),
        (_index()[:20], r"a.idx: has 20 bytes, its header has 34"),
        (_index()[:-1], r"a.idx: has 81 bytes, but its header names 2 items and 3 documents, which take 82"),
        (_index() + b"\0", r"a.idx: has 83 bytes, but"),
        (_index(version=2), r"a.idx: is of version 2 with ids of type 8, expected version 1 and an integer type"),
        (_index(code=6), r"with ids of type 6"),
        (_index(documents=(0, 2)), r"has 2 items in 1 documents, expected one item for each"),
        (_index(documents=(0, 0, 2)), r"a document from 0 on is not one item"),
        (_index(documents=(0, 1, 1)), r"the end of its documents is not that of its items"),
        (_index(sizes=(2, -2)), r"item 1 has a negative size"),
        (_index(pointers=(0, 2)), r"an item from 0 on does not begin where the one before it ends"),
        (_index(sizes=(2, 3)), r"a.bin: has 8 bytes, .*a.idx names 10; copy both files again"),
        (_index(sizes=(), pointers=(), documents=(0,)), r"a.bin: has 8 bytes, .*a.idx names 0"),
        (struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 2**63, 2**63 + 1), r"a.idx: has 34 bytes, but its header"),
    ],
)
def test_a_damaged_index_is_one_error(tmp_path, content, message):
    index = write_ids(tmp_path / "a", [[300, 0], [301, 0]])
    index.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(index, tokenizer="rwkv-world")


def test_an_id_outside_the_vocabulary_stops_the_build(tmp_path):
    index = write_ids(tmp_path / "a", [[300, 0], [70000, 0]], code=4, dtype="<i4")
    message = r"a.bin: row 1: the id 70000 is not in the vocabulary of 'rwkv-world' \(65,536 ids\); name the tokenizer"
    with pytest.raises(InputError, match=message):
        read(index, tokenizer="rwkv-world")
    with pytest.raises(InputError, match="row 0: the id -1 is not in"):
        read(write_ids(tmp_path / "b", [[-1]], code=4, dtype="<i4"), tokenizer="rwkv-world")


def test_an_index_without_its_ids_is_refused(tmp_path):
    index = write_ids(tmp_path / "a", [[300, 0]])
    index.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=r"sources.s: .*a.idx: found no .*a.bin beside it"):
        read(index, tokenizer="rwkv-world")


def test_without_a_tokenizer_ids_cannot_be_read(tmp_path):
    index = write_ids(tmp_path / "a", [[300, 0]])
    with pytest.raises(UserError, match=r"a.idx: holds ids; name the tokenizer .* `sources.s.tokenizer`"):
        read(index)


def test_an_index_is_read_where_a_path_or_pattern_names_it(tmp_path, write_lines):
    write_lines(tmp_path / "a.jsonl", ["line"])
    write_ids(tmp_path / "a", encoded(["ids"]))
    assert read(tmp_path, tokenizer="rwkv-world")[0] == [(0, "line")]
    assert read(tmp_path / "*", tokenizer="rwkv-world")[0] == [(0, "line")]
    assert read(tmp_path / "*.idx", tokenizer="rwkv-world")[0] == [(0, "ids")]


def test_a_folder_of_ids_alone_says_how_to_read_them(tmp_path):
    write_ids(tmp_path / "a", encoded(["ids"]))
    with pytest.raises(UserError, match=r"it has 1 .bin, 1 .idx.*; .idx files are read where `paths` ends in .idx"):
        read(tmp_path, tokenizer="rwkv-world")


def test_ids_and_lines_of_one_name_are_not_read_together(tmp_path, write_lines):
    lines = write_lines(tmp_path / "a.jsonl", ["line"])
    index = write_ids(tmp_path / "a", encoded(["line"]))
    with pytest.raises(UserError, match=r"both a.idx and a.jsonl are read, which hold the same documents"):
        plan_units({"s": SourceConfig(paths=[str(lines), str(index)], tokenizer="rwkv-world")}, unit_bytes=1)


def test_ids_of_the_recipes_tokenizer_need_no_other_name(tmp_path, tokenizer_folder):
    index = write_ids(tmp_path / "a", encoded(["fox"], tokenizer_folder))
    source = SourceConfig(paths=[str(index)])
    (unit,) = plan_units({"s": source}, unit_bytes=1000)
    (documents,) = read_unit(unit, source, tokenizer=load_tokenizer(tokenizer_folder))
    assert documents.texts == ["fox"]


def test_a_source_is_another_with_another_tokenizer(tokenizer_folder):
    plain = SourceConfig(paths=["a.idx"])
    named = SourceConfig(paths=["a.idx"], tokenizer=str(tokenizer_folder))
    assert "tokenizer" not in source_identity(plain)  # finished data sets keep their identity
    assert json.dumps(source_identity(named)).count("sha256") == 1
