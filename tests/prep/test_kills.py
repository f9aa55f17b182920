"""SIGKILL at any moment, then the same command: nothing is lost, nothing is there twice, and the bytes are the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from prep.build import build
from prep.config import PrepConfig
from prep.dataset.verification import verify
from prep.execution.task_store import WorkError, done_folder, load_done, locked
from prep.stages.tokenization import UnitRecord
from streaming_rwkv.shards import MANIFEST_NAME
from tests.prep.processes import kill, members, started, wait_for, workers


def content(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and ".prep" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture
def corpus(tmp_path, write_lines) -> Path:
    """Many units of different kinds: some seconds of work in small steps."""
    draw = random.Random(0)
    words = ["alpha", "beta", "床前", "明月光", "def f():\n", "0123456789", "🎉", " "]
    for number in range(24):
        texts = ["".join(draw.choices(words, k=draw.choice([3, 30, 300, 2000]))) for _ in range(40)]
        write_lines(tmp_path / "corpus" / f"{number:02}.jsonl{'.gz' if number % 2 else ''}", [*texts, *texts[:3]])
    return tmp_path / "corpus"


@pytest.fixture
def recipe(corpus, tmp_path, tokenizer_folder) -> Callable[..., Path]:
    def write(out: Path, **values: object) -> Path:
        values = {
            "out": str(out),
            "tokenizer": str(tokenizer_folder),
            "sources": {"corpus": {"paths": str(corpus)}},
            "validation": 0.05,
            "unit_bytes": 1 << 14,
            "window_tokens": 1 << 16,
            "shard_bytes": 1 << 17,
            "workers": 2,
            **values,
        }
        file = tmp_path / f"{out.name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    return write


def expected(corpus: Path, tokenizer_folder: Path, recipe: Callable[..., Path], tmp_path: Path) -> dict[str, bytes]:
    values = yaml.safe_load(recipe(tmp_path / "whole", workers=1).read_text())
    build(PrepConfig.model_validate(values))
    return content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_of_all_processes_at_random_moments(corpus, recipe, tokenizer_folder, tmp_path):
    wanted = expected(corpus, tokenizer_folder, recipe, tmp_path)
    file = recipe(tmp_path / "timed")
    begun = time.monotonic()
    with started(file) as process:
        assert process.wait() == 0, process.stderr.read()
    whole_run = time.monotonic() - begun

    draw = random.Random(1)
    kills = builds = 0
    while kills < 20:
        out = tmp_path / f"killed{builds}"
        builds += 1
        finished = False
        while not finished:
            is_empty, begun = not out.exists(), time.monotonic()
            with started(recipe(out)) as process:
                try:
                    finished = process.wait(timeout=draw.uniform(0.3, 1.0) * whole_run) == 0
                    assert finished, process.stderr.read()
                    if is_empty:  # the first run was slow: else all would end before their kill
                        whole_run = min(whole_run, time.monotonic() - begun)
                except subprocess.TimeoutExpired:
                    kill(process)
                    kills += 1
        assert content(out) == wanted
        verify(out)


@pytest.mark.slow
def test_when_the_one_that_was_started_dies_so_do_its_workers(recipe, tmp_path):
    with started(recipe(tmp_path / "out")) as process:
        wait_for(lambda: len(workers(process.pid)) == 2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: not members(process.pid))


@pytest.mark.slow
def test_a_worker_that_dies_alone_ends_the_build_with_advice(corpus, recipe, tokenizer_folder, tmp_path):
    wanted = expected(corpus, tokenizer_folder, recipe, tmp_path)
    file = recipe(tmp_path / "out")
    with started(file) as process:
        one, _ = wait_for(lambda: both if len(both := workers(process.pid)) == 2 else [])
        os.kill(one, signal.SIGKILL)
        assert process.wait(timeout=60) == 1
        assert "error: a worker process died" in process.stderr.read()
        wait_for(lambda: not members(process.pid))
    with started(file) as process:
        assert process.wait() == 0, process.stderr.read()
    assert content(tmp_path / "out") == wanted


# --- what a start finds ---


class Stop(Exception):
    """Interrupts a build from within."""


def interrupted_after(units: int, config: PrepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a build in this process until so many units are done."""
    import prep.build

    done = 0
    original = prep.build.do_unit

    def counting(*arguments: object) -> object:
        nonlocal done
        if done == units:
            raise Stop
        done += 1
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(prep.build, "do_unit", counting)
        with pytest.raises(Stop):
            build(config)


@pytest.fixture
def small(config, write_lines, tmp_path) -> Callable[..., PrepConfig]:
    for number in range(4):
        write_lines(tmp_path / "corpus" / f"{number}.jsonl", [f"document {number} {row}" for row in range(50)])
    return lambda **values: config(unit_bytes=1000, **values)


def test_finished_units_are_not_done_again(small, tmp_path, monkeypatch):
    interrupted_after(3, small(), monkeypatch)
    records = sorted((tmp_path / "out" / ".prep" / "done" / "units").glob("*/record.json"))
    times = {file: file.stat().st_mtime_ns for file in records}
    assert len(times) == 3
    monkeypatch.setattr("prep.build._clear", lambda work: None)
    build(small())
    assert {file: file.stat().st_mtime_ns for file in records} == times


def test_a_damaged_unit_is_done_again(small, tmp_path, monkeypatch):
    build(small(out=str(tmp_path / "whole")))
    interrupted_after(3, small(), monkeypatch)
    work = tmp_path / "out" / ".prep"
    damaged, whole, _ = sorted(f"units/{folder.name}" for folder in (work / "done" / "units").iterdir())
    file = done_folder(work, damaged) / "pieces.bin"
    content_of_file = bytearray(file.read_bytes())
    content_of_file[100] ^= 1
    file.write_bytes(content_of_file)
    assert load_done(work, damaged, UnitRecord) is None
    assert load_done(work, whole, UnitRecord) is not None
    build(small())
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_unit_without_its_record_is_done_again(small, tmp_path, monkeypatch):
    interrupted_after(2, small(), monkeypatch)
    record = next((tmp_path / "out" / ".prep" / "done" / "units").glob("*/record.json"))
    record.write_text("{")
    build(small())
    verify(tmp_path / "out")


def test_a_changed_configuration_over_unfinished_work_is_refused(small, monkeypatch):
    interrupted_after(2, small(), monkeypatch)
    with pytest.raises(ValueError, match=r"holds an unfinished build.*\n  config\.pack_tokens: was 8192, is 4096"):
        build(small(pack_tokens=4096))


def test_changed_input_under_unfinished_work_is_refused(small, tmp_path, monkeypatch, write_lines):
    interrupted_after(2, small(), monkeypatch)
    write_lines(tmp_path / "corpus" / "3.jsonl", ["another text"])
    with pytest.raises(ValueError, match=r"holds an unfinished build.*\n  files/corpus/3\.jsonl: \d+ bytes"):
        build(small())


def test_accepted_changes_of_the_input_cost_the_units_that_changed(small, tmp_path, monkeypatch, write_lines, caplog):
    interrupted_after(6, small(), monkeypatch)
    units = tmp_path / "out" / ".prep" / "done" / "units"
    write_lines(tmp_path / "corpus" / "2.jsonl", [f"another text {row}" for row in range(50)])
    (tmp_path / "corpus" / "3.jsonl").unlink()
    build(small(out=str(tmp_path / "whole")))
    (tmp_path / "out" / "train" / "corpus").mkdir(parents=True)  # of a build that was almost there
    (tmp_path / "out" / "train" / "corpus" / "shard.99999.mds.zstd").write_bytes(b"old")
    kept = {folder.name: (folder / "record.json").stat().st_mtime_ns for folder in units.iterdir()}

    monkeypatch.setattr("prep.build._clear", lambda work: None)
    build(small(), accept_changes=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    now = {folder.name: (folder / "record.json").stat().st_mtime_ns for folder in units.iterdir()}
    # Of the six, two were of the files that changed.
    assert [now[name] for name in kept if name in now] == [time for name, time in kept.items() if name in now]
    assert len(kept.keys() & now.keys()) == 4
    assert "files/corpus/2.jsonl" in caplog.text
    assert "files/corpus/3.jsonl: gone" in caplog.text


def test_another_key_for_the_text_can_be_accepted_and_another_pack_size_cannot(small, tmp_path, monkeypatch):
    interrupted_after(2, small(), monkeypatch)
    renamed = {"corpus": {"paths": str(tmp_path / "corpus"), "text": "content"}}
    with pytest.raises(WorkError, match=r"sources\.corpus\.text: was 'text', is 'content'\nundo .*--accept-changes"):
        build(small(sources=renamed))
    with pytest.raises(WorkError, match=r"pack_tokens: was 8192, is 4096\nundo the change, choose another `out=`"):
        build(small(pack_tokens=4096), accept_changes=True)
    for file in (tmp_path / "corpus").iterdir():
        file.write_text(file.read_text().replace('"text"', '"content"'))
    build(small(sources=renamed), accept_changes=True)
    build(small(sources=renamed, out=str(tmp_path / "whole")))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_two_builds_at_once_in_one_folder_are_refused(small, tmp_path):
    with (
        locked(tmp_path / "out" / ".prep"),
        pytest.raises(ValueError, match=f"in use .by process {os.getpid()}.*choose another `out=`"),
    ):
        build(small())


def test_what_an_interrupted_start_was_writing_is_cleared(small, tmp_path):
    stray = tmp_path / "out" / ".prep" / "tmp" / "stray"
    stray.mkdir(parents=True)
    build(small())
    assert not stray.exists()


def test_a_manifest_that_was_being_written_leaves_nothing(small, tmp_path, monkeypatch):
    build(small(out=str(tmp_path / "whole")))
    replace = os.replace

    def killed_before(source: Path, target: Path) -> None:
        if Path(target).name == MANIFEST_NAME:
            raise Stop
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed_before)
        patched.setattr(os, "getpid", lambda: 1)  # another process's
        with pytest.raises(Stop):
            build(small())
    assert content(tmp_path / "out") != content(tmp_path / "whole")
    build(small())
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_work_left_behind_a_finished_data_set_is_cleared(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("prep.build._clear", lambda work: None)  # killed just before it
        build(small())
    assert (tmp_path / "out" / ".prep" / "done").exists()
    assert build(small()).was_finished
    assert not (tmp_path / "out" / ".prep" / "done").exists()
