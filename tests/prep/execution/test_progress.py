"""Progress on the console, and the tables at the end of a build."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from prep.build import build
from prep.commands.dry_run import count, count_table
from prep.commands.tables import document_table, stream_table
from prep.document import Rejection
from prep.execution import progress
from prep.execution.observer import TokenizationProgress
from prep.execution.progress import observing


def run(console: Console) -> None:
    with observing(console) as observer:
        observer.step("tokenizing", totals={"c4": 300, "poems": 100})
        observer.progress(TokenizationProgress(source="c4", documents=1234, text_bytes=5_000_000, tokens=2_000_000))
        observer.done("c4", 150)
        observer._bars.refresh()  # on a terminal it happens ten times a second
        observer.step("packing", totals={"c4": 10})
        observer.done("c4", 10)


def test_a_terminal_has_a_bar_for_each_source():
    console = Console(file=io.StringIO(), force_terminal=True, width=200, height=30)
    run(console)
    shown = console.file.getvalue()
    for expected in ("tokenizing c4", "tokenizing poems", "1,234 documents", "MB/s", "M tokens/s", "50%", "packing c4"):
        assert expected in shown


def test_progress_in_a_log_is_lines(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    console = Console(file=io.StringIO(), width=160)
    run(console)
    lines = console.file.getvalue().splitlines()
    assert any(line.startswith("tokenizing: 38 %") and "1,234 documents" in line for line in lines)  # 150 of 400
    assert lines[-1].startswith("packing: 100 %")


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


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def test_a_finished_build_shows_its_tables(config, corpus):
    manifest = build(config(edges=[5, 10], pack_tokens=20)).manifest
    # 5 inputs in a pack of 20, 10 in another: a quarter and a half.
    streams = shown(stream_table(manifest))
    assert "25.0%" in streams
    assert "50.0%" in streams
    assert "37.5%" in streams
    assert [cell.strip() for cell in shown(document_table(manifest)).splitlines()[4].split("│")[1:-1]] == [
        "corpus",
        "3",
        "2",
        "0",
        "1",
        "0",
    ]


def test_a_dry_run_shows_its_counts(config, corpus, tmp_path, write_lines):
    (tmp_path / "corpus" / "b.jsonl").write_text('{"text": 5}\n{"body": ""}\n{"body": ""}\n')
    write_lines(tmp_path / "more" / "a.jsonl", ["0"])
    sources = {name: {"paths": str(tmp_path / name)} for name in ("more", "corpus")}
    records = count(config(edges=[5, 10], validation=0.5, sources=sources, unit_bytes=1))
    rows = shown(count_table(records, [5, 10])).splitlines()
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows if "│" in row]
    assert cells == [
        ["corpus", "1-5", "2", "2", "10", ""],
        ["corpus", "6-10", "1", "1", "10", ""],
        ["corpus", "all", "3", "3", "20", "1 'text' is not a string, 2 no 'text'"],
        ["more", "1-5", "1", "1", "2", ""],
        ["more", "all", "1", "1", "2", "0"],
    ]
