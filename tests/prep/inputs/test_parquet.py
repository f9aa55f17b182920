"""Parquet: kinds of columns, row groups, and errors that name file, row and column."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from prep.config import SourceConfig
from prep.inputs.faults import InputError
from prep.inputs.parquet import _longest_repeated, read_parquet
from prep.inputs.readers import read_unit
from prep.inputs.units import plan_units
from tests.prep.inputs.reading import read, write_parquet

HOOKS = """
class Text(str):
    def __str__(self): return "not this"
    def encode(self, *_): return b"nor this"

def keep(record): return True
def uses(record): return record["when"] > 5
def shows(record): return f"{record['when']}"
def subclass(record): return Text(record["text"] + "!")
def surrogate(record): return Text("\\ud800")
def leaves(record): raise SystemExit(3)
def panics(record): raise BaseException("a Rust panic")
def interrupts(record): raise KeyboardInterrupt
"""


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "hooks_beside_parquet.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    return "hooks_beside_parquet"


def texts_of(path: Path, **config: Any) -> list[str]:
    source = SourceConfig(paths=[str(path)], **config)
    units = plan_units({"s": source}, unit_bytes=1 << 20)
    return [text for unit in units for documents in read_unit(unit, source) for text in documents.texts]


def refusal(path: Path, **config: Any) -> str:
    with pytest.raises(InputError) as raised:
        texts_of(path, **config)
    return str(raised.value)


def integers(value: int) -> pa.Array:
    return pa.array([0, value], pa.int64())


UNREADABLE = {
    "nanoseconds": integers(1).cast(pa.timestamp("ns")),
    "beyond the year 9999": integers(300_000_000_000_000_000).cast(pa.timestamp("us")),
    "an unknown time zone": integers(0).cast(pa.timestamp("us", "Foo/Bar")),
    "a time of nanoseconds": integers(123456789).cast(pa.time64("ns")),
    "a long duration": integers(2**62).cast(pa.duration("ns")),
    "a far day": pa.array([0, 2**30], pa.int32()).cast(pa.date32()),
    "within a struct": pa.StructArray.from_arrays([integers(300_000_000_000_000_000).cast(pa.timestamp("us"))], ["at"]),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_value_that_python_cannot_represent_stops_only_hooks_that_use_it(
    tmp_path: Path, hooks: str, kind: str
) -> None:
    try:
        UNREADABLE[kind].to_pylist()
    except Exception:  # noqa: BLE001  # whatever it is: the reader must cope
        pass
    else:
        pytest.skip("this pyarrow, with what is installed beside it, can hold it")
    pq.write_table(pa.table({"text": ["zero", "one"], "when": UNREADABLE[kind]}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["zero", "one"]
    assert texts_of(tmp_path / "a.parquet", filter=f"{hooks}:keep") == ["zero", "one"]
    expected = f"{tmp_path}/a.parquet: row {0 if kind == 'an unknown time zone' else 1}: a hook of `sources.s` raised"
    refused = refusal(tmp_path / "a.parquet", transform=f"{hooks}:shows")
    assert refused.startswith(f"{expected} InputError: column 'when' has a ")
    assert "that Python cannot represent (" in refused


def test_a_hook_that_compares_such_a_value_is_named(tmp_path: Path, hooks: str) -> None:
    far = pa.array([300_000_000_000_000_000], pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["x"], "when": far}), tmp_path / "a.parquet")
    refused = refusal(tmp_path / "a.parquet", filter=f"{hooks}:uses")
    assert "row 0: a hook of `sources.s` raised InputError: column 'when' has a timestamp[us]" in refused


def test_two_columns_of_one_name_are_an_error_if_they_are_used(tmp_path: Path, hooks: str) -> None:
    column = pa.array(["x"])
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_arrays([column] * 3, names=["text", "other", "other"]), tmp_path / "b.parquet")
    expected = "has 2 columns {!r}, which is ambiguous; rename them"
    for more in ({}, {"filter": f"{hooks}:keep"}, {"transform": f"{hooks}:subclass"}):
        assert refusal(tmp_path / "a.parquet", **more) == f"{tmp_path}/a.parquet: {expected.format('text')}"
    assert texts_of(tmp_path / "b.parquet") == ["x"]
    assert refusal(tmp_path / "b.parquet", filter=f"{hooks}:keep").endswith(expected.format("other"))


class _PlainKeys(encryption.KmsClient):
    """A key service that does not encrypt keys, for files that are never decrypted."""

    def __init__(self, _: object) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, wrapped: bytes, _: str) -> bytes:
        return base64.b64decode(wrapped)


@pytest.mark.parametrize("plaintext_footer", [True, False])
@pytest.mark.parametrize("encrypted", ["text", "secret"])
def test_encrypted_parquet_is_named_and_ends_no_process(tmp_path: Path, plaintext_footer: bool, encrypted: str) -> None:
    factory = encryption.CryptoFactory(_PlainKeys)
    how = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"c": [encrypted]}, plaintext_footer=plaintext_footer
    )
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
    table = pa.table({"text": ["hello"], "secret": ["x"]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    assert refusal(tmp_path / "a.parquet") == (
        f"{tmp_path}/a.parquet: is encrypted parquet; decrypt it, or remove it from the source"
    )


def test_a_page_that_differs_from_its_checksum_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"text": ["The quick brown fox"]})
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, file, write_page_checksum=True, **plain)
    assert texts_of(file) == ["The quick brown fox"]
    content = file.read_bytes()
    file.write_bytes(content.replace(b"quick", b"Quick", 1))
    assert refusal(file).startswith(f"{file}: broken parquet after row 0 (")
    assert "CRC" in refusal(file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:6] + content[-6:],
        lambda content: content[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda content: b"PAR1",
        lambda content: b"PARE",
        lambda content: b"",
    ],
)
def test_a_damaged_footer_names_the_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"] * 100}), file)
    file.write_bytes(damage(file.read_bytes()))
    assert refusal(file).startswith(f"{file}: ")


def test_every_flipped_bit_of_a_small_file_gives_text_or_a_named_error(tmp_path: Path, hooks: str) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a text"], "n": [5]}), file, write_page_checksum=True)
    whole = file.read_bytes()
    named: list[str] = []
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        for more in ({}, {"filter": f"{hooks}:keep"}):
            try:
                texts_of(file, **more)
            except InputError as error:
                named.append(str(error))
    assert named
    assert all(error.startswith(f"{file}: ") for error in named)


def test_strings_of_a_subclass_are_read_as_plain_strings(tmp_path: Path, hooks: str) -> None:
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    for name, expected in (("a.parquet", "one!"), ("b.jsonl", "two!")):
        (text,) = texts_of(tmp_path / name, transform=f"{hooks}:subclass")
        assert (text, type(text)) == (expected, str)
        assert texts_of(tmp_path / name, transform=f"{hooks}:surrogate") == []  # invalid UTF-8


@pytest.mark.parametrize(("hook", "error"), [("leaves", "SystemExit: 3"), ("panics", "BaseException: a Rust panic")])
def test_a_hook_that_would_end_the_program_is_named(tmp_path: Path, hooks: str, hook: str, error: str) -> None:
    file = tmp_path / "b.jsonl"
    file.write_text('{"text": "two"}\n')
    expected = f"{file}: row 0: a hook of `sources.s` raised {error}; fix it"
    for kind in ("filter", "transform"):
        assert refusal(file, **{kind: f"{hooks}:{hook}"}).startswith(expected)


def test_an_interrupt_within_a_hook_is_raised_unchanged(tmp_path: Path, hooks: str) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    with pytest.raises(KeyboardInterrupt):
        texts_of(tmp_path / "b.jsonl", filter=f"{hooks}:interrupts")


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_every_kind_of_string_column_is_read(tmp_path, kind):
    column = pa.array(["one", "二", None, "", "one"], pa.string()).cast(kind)
    file = write_parquet(tmp_path / "a.parquet", column)
    expected = ([(0, "one"), (1, "二"), (3, ""), (4, "one")], [(2, "'text' is null")])
    assert read(file) == expected


def test_a_parquet_file_without_rows_has_no_documents(tmp_path):
    assert read(write_parquet(tmp_path / "a.parquet", pa.array([], pa.string()))) == ([], [])


def test_a_column_of_nulls_is_rejected_row_by_row(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", pa.nulls(2))
    assert read(file) == ([], [(0, "'text' is null"), (1, "'text' is null")])


def test_invalid_utf8_in_a_string_column_is_rejected(tmp_path):
    broken = pa.array([b"one", b"\xff", b"two"], pa.binary())
    column = pa.StringArray.from_buffers(3, *broken.buffers()[1:])
    assert read(write_parquet(tmp_path / "a.parquet", column)) == ([(0, "one"), (2, "two")], [(1, "invalid UTF-8")])


def test_row_groups_become_parts_with_consecutive_rows(tmp_path):
    texts = [f"{number:05}" * 20 for number in range(1000)]
    file = write_parquet(tmp_path / "a.parquet", pa.array(texts), row_group_size=100)
    source = SourceConfig(paths=[str(file)])
    units = plan_units({"s": source}, unit_bytes=20_000)
    assert len(units) > 2
    assert [part.row_groups for unit in units for part in unit.parts][:2] == [(0,), (1,)]
    documents = [documents for unit in units for documents in read_unit(unit, source)]
    assert np.concatenate([part.rows for part in documents]).tolist() == list(range(1000))
    assert [text for part in documents for text in part.texts] == texts


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("body", pa.array(["x"]), "no column 'text', found id, body; name the right one with `sources.s.text`"),
        ("text", pa.array([1]), "column 'text' is of type int64, expected strings"),
    ],
)
def test_a_parquet_file_without_text_is_named_with_its_columns(tmp_path, name, column, message):
    with pytest.raises(InputError, match=rf"a\.parquet: {message}"):
        read(write_parquet(tmp_path / "a.parquet", column, name=name))


def test_a_parquet_file_that_is_broken_inside_is_an_error(tmp_path):
    texts = [np.random.default_rng(row).bytes(2000).hex() for row in range(100)]
    file = write_parquet(tmp_path / "a.parquet", pa.array(texts), row_group_size=10)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 5000] = bytes(5000)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: broken parquet after row \d+ .*; download it again"):
        read(file)


def test_a_file_that_ends_the_process_which_reads_it_is_named(tmp_path: Path) -> None:
    for name in "abc":
        write_parquet(tmp_path / f"{name}.parquet", pa.array(["one", "two"]))
    broken = tmp_path / "b.parquet"
    content = broken.read_bytes()
    # In the footer the column becomes required, so the histogram of its levels is too long.
    assert content.count(b"\x25\x02\x18\x04text") == 1
    broken.write_bytes(content.replace(b"\x25\x02\x18\x04text", b"\x25\x00\x18\x04text"))
    assert refusal(tmp_path) == f"{broken}: cannot be read as parquet (pyarrow crashes); download it again"


def test_rows_that_the_footer_promises_and_the_columns_lack_are_missed(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", pa.array(["one", "two"]))
    content = file.read_bytes()
    # Field 3 of each column's struct, its metadata, becomes field 10, which nobody knows: pyarrow reads no rows.
    assert content.count(b"\x26\x00\x1c") == 2
    file.write_bytes(content.replace(b"\x26\x00\x1c", b"\x26\x00\x8c"))
    assert "broken parquet after row 0 (of 2 that its footer promises); " in refusal(file)


@pytest.mark.parametrize("stores_schema", [True, False], ids=["dictionaries", "strings"])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_dictionary_is_not_expanded_for_all_rows_at_once(
    hooked: bool, stores_schema: bool, hooks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.inputs.parquet._READ_EXPANDED_BYTES", 100_000)
    long = "word " * 2000  # 10 kB, in a file of 2 kB
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 500, pa.int32()), [long, "short"])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path, store_schema=stores_schema, row_group_size=700)
    source = SourceConfig(paths=[str(path)], **({"filter": f"{hooks}:keep"} if hooked else {}))
    found = []
    for unit in plan_units({"s": source}, unit_bytes=1 << 20):
        for part in unit.parts:
            for _, values, _ in read_parquet(part, source):
                assert len(values) <= 10
                found += [value["text"] if hooked else value for value in values]
    assert found == [long, "short"] * 500


def test_values_that_share_their_beginnings_are_not_expanded_for_all_rows_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.inputs.parquet._READ_EXPANDED_BYTES", 100_000)
    path, texts = tmp_path / "a.parquet", ["word " * 2000 + str(row) for row in range(100)]
    encoding = {"text": "DELTA_BYTE_ARRAY"}
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, column_encoding=encoding)
    source = SourceConfig(paths=[str(path)])
    (unit,) = plan_units({"s": source}, unit_bytes=1 << 20)
    values = [values for part in unit.parts for _, values, _ in read_parquet(part, source)]
    assert max(map(len, values)) <= 10
    assert [value for some in values for value in some] == texts


@pytest.mark.parametrize("hooked", [False, True])
def test_a_text_that_is_too_long_is_rejected(
    hooked: bool, hooks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.inputs.parquet._MOST_TEXT_BYTES", 1000)
    path = write_parquet(tmp_path / "a.parquet", pa.array(["a" * 600, "b" * 1001, None, "c" * 600]))
    chosen = {"filter": f"{hooks}:keep"} if hooked else {}
    texts, rejections = read(path, **chosen)
    assert texts == [(0, "a" * 600), (3, "c" * 600)]
    assert rejections == [(1, "text longer than 256 MiB"), (2, "'text' is null")]


@pytest.mark.parametrize("hooked", [False, True])
def test_short_texts_of_a_large_dictionary_are_read(
    hooked: bool, hooks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.inputs.parquet._MOST_TEXT_BYTES", 1000)
    texts = ["a" * 600, "b" * 1001, "c" * 700]
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 0], pa.int32()), texts)
    path = write_parquet(tmp_path / "a.parquet", column)
    chosen = {"filter": f"{hooks}:keep"} if hooked else {}
    assert read(path, **chosen) == (
        [(0, texts[0]), (2, texts[2]), (3, texts[0])],
        [(1, "text longer than 256 MiB")],
    )


def test_a_header_that_is_written_otherwise_is_taken_for_the_largest(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["word " * 100] * 50}), path)
    content = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(0)
    start = group.column(0).dictionary_page_offset
    with open(path, "rb") as file:
        assert _longest_repeated(file, group) == 4 + 500
    content[start + 1 : start + 2] = b"\x84\x00"  # the type of a dictionary page, in two bytes
    assert _longest_repeated(io.BytesIO(bytes(content)), group) == group.column(0).total_uncompressed_size
