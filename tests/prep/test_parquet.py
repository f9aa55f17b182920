"""Parquet that pyarrow cannot read, or Python cannot hold: one error that names file, row and column."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from prep.config import SourceConfig
from prep.inputs.readers import InputError
from prep.inputs.units import plan_units, read_unit

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


def read(path: Path, **config: Any) -> list[str]:
    source = SourceConfig(paths=[str(path)], **config)
    units = plan_units({"s": source}, unit_bytes=1 << 20)
    return [text for unit in units for documents in read_unit(unit, source) for text in documents.texts]


def refusal(path: Path, **config: Any) -> str:
    with pytest.raises(InputError) as raised:
        read(path, **config)
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
def test_a_value_that_python_cannot_hold_stops_only_hooks_that_use_it(tmp_path: Path, hooks: str, kind: str) -> None:
    try:
        UNREADABLE[kind].to_pylist()
    except Exception:  # noqa: BLE001  # whatever it is: the reader must cope
        pass
    else:
        pytest.skip("this pyarrow, with what is installed beside it, can hold it")
    pq.write_table(pa.table({"text": ["zero", "one"], "when": UNREADABLE[kind]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["zero", "one"]
    assert read(tmp_path / "a.parquet", filter=f"{hooks}:keep") == ["zero", "one"]
    expected = f"{tmp_path}/a.parquet: row {0 if kind == 'an unknown time zone' else 1}: a hook of `sources.s` raised"
    refused = refusal(tmp_path / "a.parquet", transform=f"{hooks}:shows")
    assert refused.startswith(f"{expected} InputError: column 'when' holds a ")
    assert "that Python cannot hold (" in refused


def test_a_hook_that_compares_such_a_value_is_named(tmp_path: Path, hooks: str) -> None:
    far = pa.array([300_000_000_000_000_000], pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["x"], "when": far}), tmp_path / "a.parquet")
    refused = refusal(tmp_path / "a.parquet", filter=f"{hooks}:uses")
    assert "row 0: a hook of `sources.s` raised InputError: column 'when' holds a timestamp[us]" in refused


def test_two_columns_of_one_name_are_an_error_where_they_matter(tmp_path: Path, hooks: str) -> None:
    column = pa.array(["x"])
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_arrays([column] * 3, names=["text", "other", "other"]), tmp_path / "b.parquet")
    expected = "has 2 columns {!r}, and which one is meant cannot be told; write it with other names"
    for more in ({}, {"filter": f"{hooks}:keep"}, {"transform": f"{hooks}:subclass"}):
        assert refusal(tmp_path / "a.parquet", **more) == f"{tmp_path}/a.parquet: {expected.format('text')}"
    assert read(tmp_path / "b.parquet") == ["x"]
    assert refusal(tmp_path / "b.parquet", filter=f"{hooks}:keep").endswith(expected.format("other"))


class _PlainKeys(encryption.KmsClient):
    """A key service without keys, for writing files that nobody decrypts."""

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
        f"{tmp_path}/a.parquet: is encrypted parquet; decrypt it, or take it out of the source"
    )


def test_a_page_that_differs_from_its_checksum_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"text": ["The quick brown fox"]})
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, file, write_page_checksum=True, **plain)
    assert read(file) == ["The quick brown fox"]
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
                read(file, **more)
            except InputError as error:
                named.append(str(error))
    assert named
    assert all(error.startswith(f"{file}: ") for error in named)


def test_strings_of_a_subclass_are_taken_as_what_they_hold(tmp_path: Path, hooks: str) -> None:
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    for name, expected in (("a.parquet", "one!"), ("b.jsonl", "two!")):
        (text,) = read(tmp_path / name, transform=f"{hooks}:subclass")
        assert (text, type(text)) == (expected, str)
        assert read(tmp_path / name, transform=f"{hooks}:surrogate") == []  # invalid UTF-8


@pytest.mark.parametrize(("hook", "error"), [("leaves", "SystemExit: 3"), ("panics", "BaseException: a Rust panic")])
def test_a_hook_that_would_end_the_program_is_named(tmp_path: Path, hooks: str, hook: str, error: str) -> None:
    file = tmp_path / "b.jsonl"
    file.write_text('{"text": "two"}\n')
    expected = f"{file}: row 0: a hook of `sources.s` raised {error}; mend it"
    for kind in ("filter", "transform"):
        assert refusal(file, **{kind: f"{hooks}:{hook}"}).startswith(expected)


def test_an_interrupt_within_a_hook_stays_one(tmp_path: Path, hooks: str) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path / "b.jsonl", filter=f"{hooks}:interrupts")
