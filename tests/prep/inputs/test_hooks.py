"""Hooks: filters and transforms of records."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.__main__ import main
from prep.build import build
from prep.config import PrepConfig, SourceConfig
from prep.inputs.faults import InputError
from prep.inputs.hooks import load_hook, recipe_identity
from streaming_rwkv.config import UserError
from tests.prep.inputs.reading import BAD_BYTE, HALF_EMOJI, read


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    (tmp_path / "hooks_of_this_test.py").write_text(
        "def short(record): return record['id'] < 3\n"
        "def joined(record): return None if record['id'] == 1 else f\"{record['title']}: {record['id']}\"\n"
        "def number(record): return 5\n"
        "def fails(record): return record['nope']\n"
        "def surrogate(record): return '\\ud800'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "hooks_of_this_test"


@pytest.fixture(params=["jsonl", "json", "parquet"])
def titled(request, tmp_path):
    records = [{"id": number, "title": f"t{number}", "text": f"x{number}"} for number in range(4)]
    file = tmp_path / f"titled.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    elif request.param == "json":
        file.write_text(json.dumps(records))
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_a_filter_sees_the_whole_record(titled, hooks):
    assert read(titled, filter=f"{hooks}:short") == (
        [(0, "x0"), (1, "x1"), (2, "x2")],
        [(3, "rejected by the filter")],
    )


def test_a_transform_makes_the_text_after_the_filter(titled, hooks):
    assert read(titled, filter=f"{hooks}:short", transform=f"{hooks}:joined") == (
        [(0, "t0: 0"), (2, "t2: 2")],
        [(1, "rejected by the transform"), (3, "rejected by the filter")],
    )


def test_with_a_transform_no_text_column_is_needed(titled, hooks):
    assert len(read(titled, transform=f"{hooks}:joined", text="absent")[0]) == 3


def test_a_transform_that_gives_no_text_is_a_broken_document(titled, hooks):
    assert read(titled, transform=f"{hooks}:number")[1][0] == (0, "'text' is not a string")
    assert read(titled, transform=f"{hooks}:surrogate")[1][0] == (0, "invalid UTF-8")


def test_invalid_utf8_in_a_column_that_a_hook_sees_is_rejected(tmp_path, hooks):
    broken = pa.array([b"zero", b"\xff", b"two"], pa.binary())
    titles = pa.StringArray.from_buffers(3, *broken.buffers()[1:])
    pq.write_table(pa.table({"id": [0, 1, 2], "title": titles, "text": ["x0", "x1", "x2"]}), tmp_path / "a.parquet")
    expected = ([(0, "x0"), (2, "x2")], [(1, "invalid UTF-8")])
    assert read(tmp_path / "a.parquet", filter=f"{hooks}:short") == expected


def test_a_filter_that_rejects_all_leaves_no_broken_file(tmp_path, hooks):
    (tmp_path / "a.jsonl").write_text('{"id": 5}\n{"id": 6}\n')
    rejected = [(0, "rejected by the filter"), (1, "rejected by the filter")]
    assert read(tmp_path / "a.jsonl", filter=f"{hooks}:short") == ([], rejected)


def test_a_hook_that_raises_names_file_and_row(titled, hooks):
    with pytest.raises(InputError, match=r"titled\.\w+: row 0: a hook of `sources.s` raised KeyError: 'nope'"):
        read(titled, transform=f"{hooks}:fails")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_hook_gets_text_only(tmp_path, hooks, name):
    records = [HALF_EMOJI % b"one", BAD_BYTE % b"two", b'{"text": "three", "id": 1}', b'{"text": "four", "id": 2}']
    content = b"\n".join(records) if name == "a.jsonl" else b"[" + b", ".join(records) + b"]"
    (tmp_path / name).write_bytes(content)
    texts, rejections = read(tmp_path / name, filter=f"{hooks}:short")
    assert texts == [(2, "three"), (3, "four")]
    assert [row for row, _ in rejections] == [0, 1]


def test_an_edited_hook_is_another_configuration(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hook_of_this_test.py").write_text("def keep(record): return True\n")
    source = SourceConfig(paths=["corpus"], filter="hook_of_this_test:keep")
    config = PrepConfig(out="o", tokenizer="t", sources={"c4": source})
    before = recipe_identity(config)
    (tmp_path / "hook_of_this_test.py").write_text("def keep(record): return False\n")
    assert recipe_identity(config) != before


@pytest.mark.parametrize("name", ["no_such_module:keep", "json:no_such_function"])
def test_a_hook_that_is_not_there_is_explained(name):
    with pytest.raises(UserError, match=f"hook '{name}'.*give module:function"):
        load_hook(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import sys\nsys.exit(3)\n", "hook 'raising_{}:keep': its module raised SystemExit: 3; fix it"),
        ("1 / 0\n", "hook 'raising_{}:keep': its module raised ZeroDivisionError: division by zero; fix it"),
        ("keep = 5\n", "hook 'raising_{}:keep': is a int, expected a function"),
    ],
)
def test_a_module_that_raises_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    number = len(content)
    (tmp_path / f"raising_{number}.py").write_text(content)
    with pytest.raises(UserError) as raised:
        load_hook(f"raising_{number}:keep")
    assert str(raised.value) == message.format(number)


@pytest.fixture
def reasons(tmp_path, monkeypatch):
    (tmp_path / "reasons_of_this_test.py").write_text(
        "import prep\n"
        "def named(record): return 'too low' if record['id'] < 2 else True\n"
        "def as_object(record): return prep.Reject('too low') if record['id'] < 2 else True\n"
        "def empty(record): return ''\n"
        "def text(record): return prep.Reject('no title') if record['id'] == 3 else record['title']\n"
        "def numbered(record): return f'number {record[\"id\"]}'\n"
        "def many_lines(record): return 'one\\ntwo'\n"
        "def long(record): return 'x' * 101\n"
        "def number(record): return prep.Reject(5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "reasons_of_this_test"


@pytest.mark.parametrize("name", ["named", "as_object"])
def test_a_filter_may_return_a_reason(titled, reasons, name):
    assert read(titled, filter=f"{reasons}:{name}") == ([(2, "x2"), (3, "x3")], [(0, "too low"), (1, "too low")])


def test_a_transform_may_return_a_reason_after_the_filter(titled, reasons):
    assert read(titled, filter=f"{reasons}:named", transform=f"{reasons}:text") == (
        [(2, "t2")],
        [(0, "too low"), (1, "too low"), (3, "no title")],
    )


def test_an_empty_text_from_a_filter_is_false(titled, reasons):
    assert read(titled, filter=f"{reasons}:empty")[1][0] == (0, "rejected by the filter")


@pytest.mark.parametrize(
    ("name", "shown"), [("many_lines", r"'one\\ntwo'"), ("long", f"'{'x' * 100}'"), ("number", "'5'")]
)
def test_a_reason_is_a_short_line(titled, reasons, name, shown):
    message = rf"row 0: a hook of `sources.s` returned the reason {shown}; expected one printable line of 1 to 100 char"
    with pytest.raises(InputError, match=message):
        read(titled, filter=f"{reasons}:{name}")


def test_reasons_are_few(tmp_path, reasons):
    (tmp_path / "many.jsonl").write_text("".join(f'{{"id": {number}}}\n' for number in range(101)))
    with pytest.raises(
        InputError, match=r"row 100: .* more than 100 different reasons, the last 'number 100'; .* leave"
    ):
        read(tmp_path / "many.jsonl", filter=f"{reasons}:numbered")


def test_reasons_are_counted_and_do_not_stop_a_build(config, titled, reasons, tmp_path, capsys):
    source = {"paths": str(titled), "filter": f"{reasons}:named", "transform": f"{reasons}:text"}
    manifest = build(config(sources={"s": source}, on_error="stop")).manifest
    assert manifest.counts["s"].rejected == {"no title": 1, "too low": 2}
    listed = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert listed[0] == {"source": "s", "file": titled.name, "row": 0, "reason": "too low"}
    assert main(["show", str(tmp_path / "out")]) == 0
    assert "1 no title, 2 too low" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "out")]) == 0
    (page,) = tmp_path.rglob("*.html")
    assert '"too low":2' in page.read_text()


@pytest.mark.parametrize("unit_bytes", [1000, 1 << 20], ids=["units of one file", "one unit"])
def test_reasons_of_a_source_are_few_though_its_files_are_many(config, reasons, tmp_path, unit_bytes):
    (tmp_path / "files").mkdir()
    for part in range(5):  # 81 in each
        lines = "".join(f'{{"id": {number}, "text": ""}}\n' for number in range(81 * part, 81 * (part + 1)))
        (tmp_path / "files" / f"{part}.jsonl").write_text(lines)
    source = {"paths": str(tmp_path / "files"), "filter": f"{reasons}:numbered"}
    with pytest.raises(
        InputError, match=r"^sources\.s: .* more than 400 different reasons, one of them 'number 400'; "
    ):
        build(config(sources={"s": source}, unit_bytes=unit_bytes))


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        ("Silent()", r"Silent, whose text cannot be shown \(RuntimeError\)"),
        ("GeneratorExit()", "GeneratorExit: "),
        ("KeyboardInterrupt()", "KeyboardInterrupt: "),
    ],
)
def test_whatever_a_hook_raises_in_a_worker_is_reported_with_its_row(
    raised: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"hooks_that_raise_{raised[:6].lower()}"
    (tmp_path / f"{name}.py").write_text(
        f"class Silent(Exception):\n    def __str__(self): raise RuntimeError\ndef fails(record): raise {raised}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in workers
    try:
        with pytest.raises(InputError, match=rf"a\.jsonl: row 0: a hook of `sources\.s` raised {shown}; fix it"):
            read(tmp_path / "a.jsonl", filter=f"{name}:fails")
    finally:
        signal.signal(signal.SIGINT, before)
