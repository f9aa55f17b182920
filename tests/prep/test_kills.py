"""Builds that are killed at any moment and started again: nothing is lost or written twice, and all bytes are equal."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from prep.build import build
from prep.config import PrepConfig
from prep.dataset.verification import verify
from prep.execution.observer import Observer
from prep.execution.task_store import WorkError, done_folder, load_done, locked
from prep.stages.records import UnitRecord
from streaming_rwkv.filesystem import temporary_path
from streaming_rwkv.shards import MANIFEST_NAME
from tests.prep.processes import kill, members, started, wait_for, workers


def content(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and ".prep" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture
def corpus(tmp_path, write_lines) -> Path:
    """A corpus of many units of different kinds: some seconds of work in small steps."""
    rng = random.Random(0)
    words = ["alpha", "beta", "床前", "明月光", "def f():\n", "0123456789", "🎉", " "]
    for number in range(24):
        texts = ["".join(rng.choices(words, k=rng.choice([3, 30, 300, 2000]))) for _ in range(40)]
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
@pytest.mark.alone  # its moments are parts of the time that a whole run took
@pytest.mark.timeout(900)
def test_a_build_killed_at_random_moments_gives_the_same_bytes(corpus, recipe, tokenizer_folder, tmp_path):
    wanted = expected(corpus, tokenizer_folder, recipe, tmp_path)
    file = recipe(tmp_path / "timed")
    begun = time.monotonic()
    with started(file) as process:
        assert process.wait() == 0, process.stderr.read()
    whole_run = time.monotonic() - begun

    rng = random.Random(1)
    kills = builds = 0
    while kills < 6:
        out = tmp_path / f"killed{builds}"
        builds += 1
        finished = False
        while not finished:
            is_empty, begun = not out.exists(), time.monotonic()
            with started(recipe(out)) as process:
                try:
                    finished = process.wait(timeout=rng.uniform(0.3, 1.0) * whole_run) == 0
                    assert finished, process.stderr.read()
                    if is_empty:  # the first run may have been slow; later ones would then end before their kill
                        whole_run = min(whole_run, time.monotonic() - begun)
                except subprocess.TimeoutExpired:
                    kill(process)
                    kills += 1
        assert content(out) == wanted
        verify(out)


@pytest.mark.slow
def test_workers_end_with_the_main_process(recipe, tmp_path):
    with started(recipe(tmp_path / "out")) as process:
        wait_for(lambda: len(workers(process.pid)) == 2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: not members(process.pid))


@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_death_of_a_worker_ends_the_build_with_advice(corpus, recipe, tokenizer_folder, tmp_path):
    wanted = expected(corpus, tokenizer_folder, recipe, tmp_path)
    file = recipe(tmp_path / "out")
    with started(file) as process:
        one, _ = wait_for(lambda: both if len(both := workers(process.pid)) == 2 else [])
        os.kill(one, signal.SIGKILL)
        assert process.wait(timeout=250) == 1
        assert re.search(r"error: a worker process died( at /.*, row \d+)?.*, most likely ", process.stderr.read())
        wait_for(lambda: not members(process.pid))
    with started(file) as process:
        assert process.wait() == 0, process.stderr.read()
    assert content(tmp_path / "out") == wanted


# --- starts after an interruption ---


class Stop(Exception):
    """Interrupts a build from within."""


class StopAfter(Observer):
    """Interrupts a build when a number of units is finished."""

    def __init__(self, units: int) -> None:
        self.units = units

    def done(self, source: str, amount: int) -> None:
        self.units -= 1
        if not self.units:
            raise Stop


class AtStep(Observer):
    """Calls a function when a step begins."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name, self.function = name, function

    def step(self, name: str, *, totals: Mapping[str, int], in_bytes: bool = False) -> None:
        if name == self.name:
            self.function()


def interrupted_after(units: int, config: PrepConfig) -> None:
    """Run a build in this process until a number of units is finished."""
    with pytest.raises(Stop):
        build(config, observer=StopAfter(units))


def record_times(units: Path) -> dict[str, int]:
    """Return when the record of each finished unit was written."""
    return {file.parent.name: file.stat().st_mtime_ns for file in units.glob("*/record.json")}


@pytest.fixture
def small(config, write_lines, tmp_path) -> Callable[..., PrepConfig]:
    for number in range(4):
        write_lines(tmp_path / "corpus" / f"{number}.jsonl", [f"document {number} {row}" for row in range(50)])
    return lambda **values: config(unit_bytes=1000, **values)


def test_finished_units_are_not_tokenized_again(small, tmp_path):
    interrupted_after(3, small())
    units = tmp_path / "out" / ".prep" / "done" / "units"
    before, after = record_times(units), {}
    assert len(before) == 3
    build(small(), observer=AtStep("packing", lambda: after.update(record_times(units))))
    assert len(after) > 3
    assert before.items() <= after.items()


def test_a_damaged_unit_is_tokenized_again(small, tmp_path):
    build(small(out=str(tmp_path / "whole")))
    interrupted_after(3, small())
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


def test_a_unit_with_a_damaged_record_is_tokenized_again(small, tmp_path):
    interrupted_after(2, small())
    record = next((tmp_path / "out" / ".prep" / "done" / "units").glob("*/record.json"))
    record.write_text("{")
    build(small())
    verify(tmp_path / "out")


def test_a_changed_configuration_over_unfinished_work_is_refused(small):
    interrupted_after(2, small())
    with pytest.raises(ValueError, match=r"holds an unfinished build.*\n  config\.pack_tokens: was 8192, is 4096"):
        build(small(pack_tokens=4096))


def test_changed_input_under_unfinished_work_is_refused(small, tmp_path, write_lines):
    interrupted_after(2, small())
    write_lines(tmp_path / "corpus" / "3.jsonl", ["another text"])
    with pytest.raises(ValueError, match=r"holds an unfinished build.*\n  files/corpus/3\.jsonl: \d+ bytes"):
        build(small())


def test_accepted_changes_of_the_input_keep_the_unchanged_units(small, tmp_path, write_lines, caplog):
    interrupted_after(6, small())
    units = tmp_path / "out" / ".prep" / "done" / "units"
    write_lines(tmp_path / "corpus" / "2.jsonl", [f"another text {row}" for row in range(50)])
    (tmp_path / "corpus" / "3.jsonl").unlink()
    build(small(out=str(tmp_path / "whole")))
    (tmp_path / "out" / "train" / "corpus").mkdir(parents=True)  # of a build that was almost finished
    (tmp_path / "out" / "train" / "corpus" / "shard.99999.mds.zstd").write_bytes(b"old")
    before, after = record_times(units), {}
    assert len(before) == 6

    build(small(), accept_changes=True, observer=AtStep("packing", lambda: after.update(record_times(units))))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert len(before.items() & after.items()) == 4  # two of the six were of the files that changed
    assert len(before.keys() & after.keys()) == 4
    assert "files/corpus/2.jsonl" in caplog.text
    assert "files/corpus/3.jsonl: gone" in caplog.text


def test_another_key_for_the_text_can_be_accepted_and_another_pack_size_cannot(small, tmp_path):
    interrupted_after(2, small())
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


def test_unfinished_files_of_an_interrupted_start_are_removed(small, tmp_path):
    stray = tmp_path / "out" / ".prep" / "tmp" / "stray"
    stray.mkdir(parents=True)
    build(small())
    assert not stray.exists()


def test_an_unfinished_manifest_of_a_killed_start_is_ignored(small, tmp_path):
    """A start that was killed while it wrote the manifest leaves part of it under a temporary name."""
    build(small(out=str(tmp_path / "whole")))
    manifest = tmp_path / "whole" / MANIFEST_NAME
    unfinished = temporary_path(tmp_path / "out" / MANIFEST_NAME)

    def killed() -> None:
        unfinished.write_bytes(manifest.read_bytes()[:100])
        raise Stop

    with pytest.raises(Stop):
        build(small(), observer=AtStep("hashing files", killed))
    assert unfinished.exists()
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    build(small())
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_work_beside_a_finished_data_set_is_removed(small, tmp_path):
    """A start that was killed after it wrote the manifest leaves its finished tasks."""
    build(small())
    left = tmp_path / "out" / ".prep" / "done" / "units" / "0"
    left.mkdir(parents=True)
    assert build(small()).was_finished
    assert not (tmp_path / "out" / ".prep" / "done").exists()


def test_work_of_the_first_version_is_refused_with_a_remedy(small, tmp_path):
    work = tmp_path / "out" / ".prep"
    work.mkdir(parents=True)
    (work / "plan.json").write_text("{}")
    with pytest.raises(WorkError, match=r"work of an earlier version.*remove \S+/out and run `streaming-rwkv prepare`"):
        build(small())
