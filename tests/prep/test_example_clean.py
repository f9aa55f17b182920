"""examples/clean.py with datatrove: what it removes and why, and that `prep` reads what it writes.

datatrove has an environment of its own, requirements/clean.txt: `.venv-clean`, or CLEAN_PYTHON names its interpreter.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.build import build
from prep.config import PrepConfig
from tests.example_modules import FOLDER

OF_ITS_OWN = FOLDER.parent / ".venv-clean" / "bin" / "python"
PYTHON = os.environ.get("CLEAN_PYTHON") or (str(OF_ITS_OWN) if OF_ITS_OWN.exists() else sys.executable)

RIVER = (
    "The river rises in the hills to the north of the town and has been used by mills since the twelfth century. "
    "Most of them are gone, but the people who live there have kept two of the wheels and the old weir.\n"
    "In spring the water comes up to the road, and the council puts out signs that tell drivers to be careful. "
    "A path leads along the bank to a bridge of three arches, built when wool was still carried to the coast."
)
BREAD = (
    "To make this bread you need flour, water, salt and a little of the dough that you have kept from the last loaf. "
    "Mix them in the evening and leave the bowl in a cool room with a cloth on top of it.\n"
    "In the morning the dough should be twice as large and full of bubbles; fold it a few times and let it rest. "
    "Bake it with steam for half an hour, then without until the crust is dark. Write to baker@bread.com for more."
)
CHINESE = (
    "这座城市位于河流的北岸，是全省的经济和文化中心。每年春天，人们都会到江边的公园里散步，看花开，也看船只来往。\n"
    "在过去的二十年中，城市的面貌有了很大的变化：旧的工厂被改建为博物馆，新的地铁线路把郊区和市中心连接起来。\n"
    "老人们说，他们年轻的时候，河上只有一座桥，过河要排队等很久。现在已经有了七座桥，而江边的灯光也成为了一道风景。"
)
CODE = "".join(f"def part_{name}(values):\n    return [{name} + value for value in values]\n\n" for name in "abcdefg")


@pytest.fixture(scope="module", autouse=True)
def _datatrove() -> None:
    found = subprocess.run([PYTHON, "-c", "import datatrove, jieba, spacy"], capture_output=True)
    if found.returncode:
        pytest.skip("needs requirements/clean.txt in .venv-clean, or CLEAN_PYTHON")


def clean(*arguments: str | Path) -> tuple[dict[str, int], str]:
    """Return the counts by what became of documents, and the error output."""
    done = subprocess.run(
        [PYTHON, FOLDER / "clean.py", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    lines = [line.strip().split("  ") for line in done.stdout.splitlines() if line.startswith("  ")]
    assert lines or done.returncode, done.stderr
    return {name: int(count.replace(",", "")) for count, name in lines}, done.stderr


def records_in(folder: Path) -> list[dict[str, Any]]:
    lines = [gzip.decompress(file.read_bytes()).splitlines() for file in sorted(folder.glob("*.jsonl.gz"))]
    return [json.loads(line) for of_file in lines for line in of_file]


@pytest.mark.slow
def test_english_is_cleaned_and_prep_reads_it(tmp_path: Path, config: Callable[..., PrepConfig]) -> None:
    corpus, out = tmp_path / "corpus" / "web", tmp_path / "cleaned"
    corpus.mkdir(parents=True)
    first: list[dict[str, Any]] = [
        {"text": RIVER, "url": "https://example.com/river"}, {"text": "too short"}, {"title": "no text"},
        {"text": "Buy now and save the money that you have. " * 40},
    ]  # fmt: skip
    lines = [json.dumps(record).encode() for record in first]
    lines.insert(1, b'{"text": "a bad byte \xff"}')  # what follows it is read
    second = [{"text": BREAD}, {"text": RIVER.replace("two of the wheels", "some of the wheels")}]
    (corpus / "0.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    (corpus / "1.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, second)).encode()))
    counts, _ = clean(corpus, out, "--kind", "en")
    assert counts == {
        "read": 7, "written": 2, "removed: near-duplicate": 1, "removed: broken line": 1, "removed: no text": 1,
        "removed: top_2_gram": 1, "removed: top_3_gram": 1,
    }  # fmt: skip
    river, bread = records_in(out / "texts")
    assert river == {"text": RIVER, "id": "0.jsonl.gz/0", "url": "https://example.com/river"}
    assert bread["text"] == BREAD.replace("baker@bread.com", "email@example.com")
    (out / "work" / "logs" / "5-write" / "completions" / "00001").unlink()  # as a kill leaves a task
    (out / "texts" / "00001.jsonl.gz").write_bytes(b"part")
    assert clean(corpus, out, "--kind", "en")[0] == counts  # and the finished tasks are not done again
    assert records_in(out / "texts") == [river, bread]
    assert "give another folder" in clean(corpus, out, "--kind", "any")[1]
    manifest = build(config(sources={"web": {"paths": str(out / "texts")}})).manifest
    assert manifest.counts["web"].documents_read == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kept", "removed", "reason"),
    [
        ("zh", CHINESE, "价格：１２３４ " * 60, "top_2_gram"),
        ("zh", CHINESE, "龘" * 300_000, "word over 1000 characters"),  # which would take an hour
        ("en", RIVER, "%" * 300_000, "word over 1000 characters"),
        ("code", CODE, f"var a={'[0,1],' * 300}0;", "line over 1000 characters"),
    ],
)
def test_other_texts_are_judged_by_their_kind(tmp_path: Path, kind: str, kept: str, removed: str, reason: str) -> None:
    """With parquet as input and output."""
    (tmp_path / "corpus").mkdir()
    table = pa.table({"content": [kept, removed, None], "score": [1, 2, 3]})
    pq.write_table(table, tmp_path / "corpus" / "0.parquet")
    arguments = ["--kind", kind, "--text", "content", "--output", "parquet"]
    counts, _ = clean(tmp_path / "corpus", tmp_path / "out", *arguments)
    assert counts == {
        "read": 3, "removed: no content": 1, f"removed: {reason}": 1, "removed: near-duplicate": 0, "written": 1,
    }  # fmt: skip
    (written,) = (tmp_path / "out" / "texts").iterdir()
    assert pq.read_table(written)["text"].to_pylist() == [kept]


@pytest.mark.slow
def test_no_key_of_a_record_has_a_meaning_for_datatrove(tmp_path: Path) -> None:
    corpus, deep = tmp_path / "corpus", '{"key": ' * 900 + "0" + "}" * 900
    corpus.mkdir()
    first = {
        "content": RIVER,
        "rank": 1,
        "media": 5,
        "token_count": "many",
        "id": 7,
        "text": "another",
        "metadata": [2],
    }
    second = {"content": BREAD, "record": "mine", "filter_reason": "mine", "media": [1], "id": 2**63}
    (corpus / "0.jsonl").write_text(f'{json.dumps(first)}\n{{"content": "deep", "key": {deep}}}\n')
    (corpus / "1.jsonl").write_text(f"{json.dumps(second)}\n{json.dumps({**second, 'id': 'copy'})}\n")
    counts, _ = clean(corpus, tmp_path / "lines", "--kind", "any", "--text", "content")
    assert counts == {
        "read": 4, "removed: record nested too deep": 1, "removed: near-duplicate": 1, "written": 2,
    }  # fmt: skip
    river, bread = records_in(tmp_path / "lines" / "texts")
    assert river == {key: value for key, value in first.items() if key != "content"} | {"text": RIVER}
    assert (bread["record"], bread["filter_reason"], bread["media"], bread["id"]) == ("mine", "mine", [1], 2**63)
    (copy,) = records_in(tmp_path / "lines" / "removed" / "duplicates")
    assert copy["id"] == "copy"
    clean(corpus, tmp_path / "table", "--kind", "any", "--text", "content", "--output", "parquet")
    assert pq.read_table(tmp_path / "table" / "texts")["id"].to_pylist() == ["7", str(2**63)]


def run_with_example(folder: Path, source: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a program that has imported the example."""
    head = f"import signal, sys\nsys.path.insert(0, {str(FOLDER)!r})\nimport clean\n"
    head += "if __name__ == '__main__': signal.alarm(110)\n"  # a test that fails leaves no program behind
    (folder / "program.py").write_text(head + source)
    command: list[str | Path] = [PYTHON, folder / "program.py", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_addresses_are_replaced_as_by_datatrove_but_in_linear_time(tmp_path: Path) -> None:
    """With datatrove's own expression each of the last texts would take minutes or hours."""
    program = run_with_example(
        tmp_path,
        """
texts = [
    "a.b-c@d.example.org", "Write to <me+you@mail.example.com>, or (them@x.de).", "8.8.8.8:80, 10.0.0.1 and 1.1.1.1.",
    "邮箱：me@example.cn。或me@example.cn", "me@[8.8.8.8] you@[1.2.3.4", "a@b a@b. a@-b.c a@b.c- @b.c a..b@c.d é@b.fr",
    "x@y.z@w.v,u@t.s\\nq@r.s", "'me'@example.com/path?to=you@example.com&x=1", f"{'a' * 250}@{'b' * 60}.com",
]
for text in texts:
    assert clean.AddressFormatter(True).format(text) == clean.PIIFormatter().format(text), text
for text in ("1." * 200_000, "a@" * 200_000, "aB3+/" * 60_000, "a/" * 200_000, "a-" * 100_000 + "@b"):
    clean.AddressFormatter(True).format(text)
print("replaced", clean.AddressFormatter(False).format("me@example.net 8.8.8.8"))
""",
    )
    output, error = program.communicate()
    assert output == "replaced email@example.com 8.8.8.8\n", error


TASKS = """
import pathlib, re
class Tasks:
    def __init__(self): self.logging_dir = self
    def get_incomplete_ranks(self): return [0]
    def resolve_paths(self, name): return name
    def _run_for_rank(self, rank):
        if sys.argv[1] == "full": raise OSError(28, "No space left on device")
        if sys.argv[1] == "bad": raise ValueError("bad text")
        pathlib.Path(sys.argv[1]).touch()
        re.match("(a+)+$", "a" * 99 + "b")  # holds the interpreter for longer than a test may take
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, clean.stop)
    with clean.Workers(1) as workers: workers.run("step", Tasks(), [pathlib.Path("0.jsonl")])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_holds_the_interpreter_ends_with_the_program(tmp_path: Path, number: signal.Signals) -> None:
    begun = tmp_path / "begun"
    program = run_with_example(tmp_path, TASKS, str(begun))
    while not begun.exists():
        assert program.poll() is None
    process = psutil.Process(program.pid)
    workers = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
    assert workers
    try:
        program.send_signal(number)
        _, error = program.communicate()
        psutil.wait_procs(workers)
    finally:
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
    if number == signal.SIGTERM:
        assert program.returncode == 128 + number
        assert error == "\nstopped; the same command resumes\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("full", "[Errno 28] No space left on device; the log is logs/task_00000.log; when that is repaired, the same"),
        ("bad", "bad text; the log is logs/task_00000.log; the same texts would fail again: remove what it names"),
    ],
)
def test_a_fault_of_the_texts_is_told_from_one_of_the_machine(tmp_path: Path, fault: str, advice: str) -> None:
    _, error = run_with_example(tmp_path, TASKS, fault).communicate()
    assert "error: step: 0.jsonl: " in error
    assert advice in error


@pytest.mark.slow
def test_what_is_no_corpus_is_named(tmp_path: Path) -> None:
    def error_of(folder: Path, out: Path) -> str:
        counts, error = clean(folder, out, "--kind", "any")
        assert not counts
        return error

    lines, damaged, pipe, mine = (tmp_path / name for name in ("lines", "damaged", "pipe", "mine"))
    for folder in (lines, damaged, pipe, mine):
        folder.mkdir()
    (lines / "0.jsonl").write_text(json.dumps({"text": RIVER}) + "\n")
    (damaged / "0.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": RIVER}).encode())[:-9])
    os.mkfifo(pipe / "0.jsonl")
    (mine / "notes.txt").write_text("mine")
    error = error_of(damaged, tmp_path / "out-1")
    assert f"error: {damaged}/0.jsonl.gz: EOFError" in error
    assert "Traceback" not in error
    assert "not a file (a pipe" in error_of(pipe, tmp_path / "out-2")
    (pipe / "0.jsonl").unlink()
    Path(os.fsdecode(os.fsencode(pipe) + b"/caf\xe9.jsonl")).touch()
    assert "bytes that are not UTF-8" in error_of(pipe, tmp_path / "out-2")
    assert "expected an empty folder" in error_of(lines, mine)
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
    assert "is within the corpus" in error_of(lines, lines / "cleaned")
    assert clean(lines, tmp_path / "out-3", "--kind", "any")[0]["written"] == 1
    (tmp_path / "out-3" / "texts").rename(tmp_path / "elsewhere")
    (tmp_path / "out-3" / "texts").symlink_to(tmp_path / "elsewhere")
    assert "out-3/texts: found a link" in error_of(lines, tmp_path / "out-3")
    (tmp_path / "out-3" / "texts").unlink()
    (lines / "1.jsonl").write_text(json.dumps({"text": BREAD}) + "\n")
    assert "holds the result for another files" in error_of(lines, tmp_path / "out-3")


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["worker", "program"])
def test_after_a_kill_no_process_is_left_and_the_same_command_resumes(tmp_path: Path, killed: str) -> None:
    """The pipe of the killed process is closed when the last process that has it ends."""
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    for number in range(2):
        (corpus / f"{number}.jsonl").write_text(f"{json.dumps({'text': RIVER})}\n" * 3_000)
    command = [PYTHON, FOLDER / "clean.py", corpus, out, "--kind", "any", "--workers", "2"]
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    logs = out / "work" / "logs" / "1-filter" / "logs"
    while len(list(logs.glob("*"))) < 2:
        assert program.poll() is None
    process = psutil.Process(program.pid)
    workers = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
    (workers[0] if killed == "worker" else process).kill()
    error = program.communicate()[1]
    if killed == "worker":
        assert "error: 1-filter: a worker process was killed" in error
    psutil.wait_procs(workers)
    assert clean(corpus, out, "--kind", "any")[0]["written"] == 1
