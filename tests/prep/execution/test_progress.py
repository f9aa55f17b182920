"""Progress on the console, and the tables at the end of a build."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from prep.build import build
from prep.commands.dry_run import count, count_table, estimate
from prep.commands.tables import data_set_warnings, document_table, fitting, short, stream_table
from prep.document import Rejection
from prep.execution import progress
from prep.execution.observer import TokenizationProgress
from prep.execution.progress import observing
from prep.inputs.units import find_sources


def run(console: Console) -> None:
    with observing(console) as observer:
        observer.step("tokenizing", totals={"c4": 300_000_000, "poems": 100_000_000}, in_bytes=True)
        amounts = {"documents": 1234, "text_bytes": 500_000_000, "tokens": 2_000_000, "input_bytes": 150_000_000}
        observer.progress(TokenizationProgress(source="c4", **amounts))
        observer._bars.refresh()  # on a terminal it happens ten times a second
        observer.step("packing", totals={"c4": 10})
        observer.done("c4", 10)


def terminal(width: int) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=30)
    run(console)
    return console.file.getvalue()


def test_a_wide_terminal_has_a_bar_for_each_source():
    shown = terminal(140)
    for expected in ("c4 ", "poems ", "150.0/300.0 MB  50%", "left ", "MB/s", "M tokens/s", "tokenizing", "packing"):
        assert expected in shown


def test_a_terminal_of_80_columns_has_one_bar_and_the_time_left():
    shown = terminal(80)
    assert "poems" not in shown
    for expected in ("tokenizing", "150.0/400.0 MB  38%", "left ", "MB/s"):
        assert expected in shown


def test_progress_in_a_log_is_lines(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    console = Console(file=io.StringIO(), width=160)
    run(console)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "tokenizing: 400.0 MB"
    assert lines[1].startswith("tokenizing: 150.0/400.0 MB  38%")
    assert "1,234 documents" in lines[1]
    assert lines[2] == "packing: 10"
    assert lines[3].startswith("packing: done in 0:00:00")
    assert len(lines) == 4


def test_work_of_an_earlier_start_does_not_count_for_the_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=160)
    with observing(console) as observer:
        observer.step("tokenizing", totals={"c4": 1000}, in_bytes=True)
        repeated = {"documents": 0, "text_bytes": 0, "tokens": 0, "input_bytes": 500}
        observer.progress(TokenizationProgress(source="c4", **repeated))
        now[0] += 20
        fresh = {"documents": 9, "text_bytes": 100, "tokens": 30, "input_bytes": 100}
        observer.progress(TokenizationProgress(source="c4", **fresh))
    assert "0.6/1.0 kB  60%, left 0:01:20; 9 documents" in console.file.getvalue()  # 400 bytes at 100 in 20 s


def test_the_first_line_says_what_is_read(config, corpus, tmp_path):
    console = Console(file=io.StringIO(), width=40)
    settings = config(workers=2)
    with observing(console) as observer:
        observer.inputs(find_sources(settings.sources), settings)
    size = (tmp_path / "corpus" / "a.jsonl").stat().st_size
    assert console.file.getvalue() == f"reading 1 source, 1 file, {size} bytes; 2 workers; {settings.out}\n"


def test_the_first_rejections_of_a_reason_are_shown():
    console = Console(file=io.StringIO(), width=40)
    with observing(console) as observer:
        for row in range(9):
            observer.rejection(Rejection(source="c4", file="[x].jsonl", row=row, reason="invalid JSON"))
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "rejected: c4: [x].jsonl: row 0: invalid JSON"
    assert len(lines) == 5
    assert lines[-1].endswith("further ones are only listed in rejected.jsonl")


def test_a_dry_run_only_counts_further_rejections():
    console = Console(file=io.StringIO(), width=200)
    with observing(console, are_listed=False) as observer:
        for row in range(9):
            observer.rejection(Rejection(source="c4", file="x.jsonl", row=row, reason="invalid JSON"))
    assert console.file.getvalue().splitlines()[-1].endswith("row 4: invalid JSON; further ones are only counted")


@pytest.fixture
def corpus(tmp_path, write_lines):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["0123", "0123", "012345678"])


def shown(table, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def cells(table, width: int = 120) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("│")[1:-1]] for row in shown(table, width).splitlines() if "│" in row]


def test_a_finished_build_shows_its_tables(config, corpus):
    manifest = build(config(edges=[5, 10], pack_tokens=20)).manifest
    # 5 inputs in a pack of 20, 10 in another: a quarter and a half.
    assert cells(stream_table(manifest, by="bucket")) == [
        ["corpus", "1-5", "1", "1", "5", "1", "25.0%", "0"],
        ["corpus", "6-10", "1", "1", "10", "1", "50.0%", "0"],
        ["corpus", "all", "2", "2", "15", "2", "37.5%", "0"],
        ["all", "", "2", "2", "15", "2", "37.5%", "0"],
    ]
    assert cells(stream_table(manifest)) == [
        ["corpus", "2", "15", "2", "37.5%", "0"],
        ["all", "2", "15", "2", "37.5%", "0"],
    ]
    assert cells(document_table(manifest)) == [["corpus", "3", "2", "0", "1", "0"]]


def large(manifest):
    """The manifest as that of a corpus of 10¹¹ tokens."""
    streams = [
        stream.model_copy(update={"documents": 123_456_789, "targets": 123_456_789_012, "packs": 12_345_678})
        for stream in manifest.streams
    ]
    return manifest.model_copy(update={"streams": streams})


def test_no_number_is_cut_in_a_narrow_terminal(config, corpus):
    manifest = large(build(config(edges=[10], pack_tokens=20)).manifest)
    for width in (66, 100, 120):
        console = Console(file=io.StringIO(), width=width)
        table = fitting(console, lambda number: stream_table(manifest, number=number))
        assert "…" not in shown(table, width)
        expected = "123,456,789,012" if width >= 100 else "123.5 G"
        assert expected in shown(table, 200)


@pytest.mark.parametrize(
    ("number", "expected"), [(9_999, "9,999"), (12_345, "12.3 k"), (25_700_000, "25.7 M"), (3 * 10**9, "3.0 G")]
)
def test_a_short_number_has_a_unit(number, expected):
    assert short(number) == expected


def test_a_data_set_that_is_too_small_is_said_to_be(config, corpus, tmp_path):
    manifest = build(config(validation=0.001)).manifest
    few, none = data_set_warnings(manifest)
    assert few.startswith("2 documents of 15 tokens: enough to try")
    assert none.startswith("no validation packs: validation=0.001 of so few documents is none")
    assert len(data_set_warnings(build(config(out=str(tmp_path / "other"), validation=0.0)).manifest)) == 1


def test_a_dry_run_shows_its_counts(config, corpus, tmp_path, write_lines):
    (tmp_path / "corpus" / "b.jsonl").write_text('{"text": 5}\n{"body": ""}\n{"body": ""}\n')
    write_lines(tmp_path / "more" / "a.jsonl", ["0"])
    sources = {name: {"paths": str(tmp_path / name)} for name in ("more", "corpus")}
    settings = config(edges=[5, 10], pack_tokens=20, validation=0.5, sources=sources, unit_bytes=1)
    counts = count(settings)
    table = cells(count_table(counts.records, settings, by="bucket"))
    # Without the packs and the column of validation, which depend on the hashes of the texts.
    assert [[*row[:5], row[7]] for row in table] == [
        ["corpus", "1-5", "2", "10", "", ""],
        ["corpus", "6-10", "1", "10", "", ""],
        ["corpus", "all", "3", "20", "17 bytes", "1 'text' is not a string, 2 no 'text'"],
        ["more", "1-5", "1", "2", "", ""],
        ["more", "all", "1", "2", "1 bytes", "0"],
        ["all", "", "4", "22", "18 bytes", "1 'text' is not a string, 2 no 'text'"],
    ]
    assert [row[:4] for row in cells(count_table(counts.records, settings))] == [
        ["corpus", "3", "20", "17 bytes"],
        ["more", "1", "2", "1 bytes"],
        ["all", "4", "22", "18 bytes"],
    ]
    about, few, following = estimate(counts, settings, seconds=100)
    assert about.startswith("a build writes about ")
    assert "takes about 0:02:00 with 1 worker" in about
    assert few.startswith("warning: 4 documents of 22 tokens")
    assert following == "next: the same command without --dry-run"
