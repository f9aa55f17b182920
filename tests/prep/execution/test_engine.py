"""Engines: each gives the same bytes, and errors in workers are raised in the main process."""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from prep.build import build
from prep.execution.context import BuildContext
from prep.execution.engine import WorkerError, start
from prep.execution.observer import Observer, TokenizationProgress
from prep.inputs.faults import InputError
from prep.inputs.units import plan_units
from streaming_rwkv.config import UserError


def content(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and ".prep" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture
def corpus(tmp_path, write_lines) -> Path:
    for number in range(8):
        texts = [f"document {number} {row} " + "床前明月光 0123456789 " * (row * row % 90) for row in range(60)]
        write_lines(tmp_path / "corpus" / f"{number}.jsonl.gz", [*texts, "the same in every file"])
    return tmp_path / "corpus"


SMALL = {"unit_bytes": 1 << 13, "window_tokens": 1 << 14, "shard_bytes": 1 << 15, "validation": 0.1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 and later, of Ray's own processes
@pytest.mark.parametrize("engine", [{"workers": 2}, {"workers": 4}, {"engine": "ray", "workers": 2}], ids=str)
def test_every_engine_gives_the_same_bytes(config, corpus, tmp_path, engine):
    build(config(out=str(tmp_path / "one"), **SMALL))
    build(config(out=str(tmp_path / "other"), **SMALL, **engine))
    assert content(tmp_path / "other") == content(tmp_path / "one")
    assert len(content(tmp_path / "one")) > 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("engine", [{"workers": 2}, {"engine": "ray", "workers": 2}], ids=str)
def test_a_user_error_in_a_worker_is_raised_unchanged(config, corpus, engine):
    (corpus / "9.jsonl.gz").write_bytes(b"no gzip, and long enough not to be taken for the end of one")
    with pytest.raises(InputError, match=r"9\.jsonl\.gz: broken gzip"):
        build(config(**SMALL, **engine))


class Counting(Observer):
    def __init__(self) -> None:
        self.documents = 0
        self.left: dict[str, dict[str, int]] = {}

    def step(self, name: str, *, totals: Mapping[str, int], in_bytes: bool = False) -> None:
        self.left[name] = dict(totals)

    def done(self, source: str, amount: int) -> None:
        list(self.left.values())[-1][source] -= amount

    def progress(self, progress: TokenizationProgress) -> None:
        self.documents += progress.documents
        self.done(progress.source, progress.input_bytes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("engine", [{"workers": 1}, {"workers": 2}, {"engine": "ray", "workers": 2}], ids=str)
def test_progress_reaches_the_observer(config, corpus, engine):
    observer = Counting()
    build(config(**SMALL, **engine), observer=observer)
    assert observer.documents == 8 * 61
    assert observer.left == {
        "tokenizing": {"corpus": 0},
        "finding duplicates": {"all sources": 0},
        "packing": {"corpus": 0},
        "hashing files": {"corpus": 0},
    }


def doubled(context: BuildContext, item: int, report: object) -> int:
    if item == 13:
        raise KeyError("a bug of our own")
    return 2 * item


def context_of(config: object, corpus: Path) -> BuildContext:
    made = config(workers=2)  # type: ignore[operator]
    from streaming_rwkv.tokenizer import load_tokenizer

    load_tokenizer(made.tokenizer).save(Path(made.out) / "tokenizer")
    return BuildContext(config=made, units=tuple(plan_units(made.sources, unit_bytes=1 << 20)), vocab_size=320)


def test_processes_yield_each_items_index_and_result(config, corpus):
    with start(context_of(config, corpus), on_report=lambda report: None) as run:
        assert sorted(run(doubled, [5, 6, 7, 8, 9])) == [(0, 10), (1, 12), (2, 14), (3, 16), (4, 18)]
        assert sorted(run(doubled, [1])) == [(0, 2)]
        assert list(run(doubled, [])) == []


def test_a_bug_in_a_worker_is_raised_in_the_main_process(config, corpus):
    with (
        pytest.raises(KeyError, match="a bug of our own"),
        start(context_of(config, corpus), on_report=lambda report: None) as run,
    ):
        list(run(doubled, [1, 13, 2]))


class PanicException(BaseException):
    """With the base class and the name of Rust's panics."""


def panic(context: BuildContext, item: object, report: object) -> None:
    raise PanicException("The global thread pool has not been initialized: Resource temporarily unavailable")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_panic_of_a_rust_library_is_an_error(config, corpus, workers):
    context = context_of(config, corpus)
    context = replace(context, config=context.config.model_copy(update={"workers": workers}))
    with (
        pytest.raises(RuntimeError, match=r"^The global thread pool"),
        start(context, on_report=lambda report: None) as run,
    ):
        list(run(panic, [1]))


def test_workers_that_cannot_be_forked_are_explained(config, corpus, monkeypatch):
    forks, fork = [], os.fork

    def refusing() -> int:
        forks.append(len(forks))
        if len(forks) == 3:  # the first is the workers' parent
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", refusing)
    with (
        pytest.raises(BlockingIOError, match="Resource temporarily unavailable"),
        start(context_of(config, corpus), on_report=lambda report: None, fork=True) as run,
    ):
        list(run(doubled, [1, 2]))


def die(context: BuildContext, item: object, report: object) -> None:
    os._exit(9)


def test_a_worker_that_dies_is_reported_with_the_place_of_its_work(config, corpus):
    context = context_of(config, corpus)
    place = rf"died at {re.escape(str(corpus))}/0\.jsonl\.gz, row 0 or a later file, most likely "
    with (
        pytest.raises(WorkerError, match=place),
        start(context, on_report=lambda report: None) as run,
    ):
        list(run(die, context.units[:1]))


def test_without_ray_the_remedy_is_named(config, corpus, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"'ray' is not installed; run `pip install '\.\[ray\]'` in a clone"):
        build(config(engine="ray"))


def test_a_tokenizer_that_workers_cannot_load_is_explained(config, corpus, tmp_path):
    (tmp_path / "bad").mkdir()
    definition = '{"model": {"type": "Nope", "vocab": {"</s>": 0}}}'
    (tmp_path / "bad" / "tokenizer.json").write_text(definition)
    with pytest.raises(UserError, match=r"tokenizer\.json: Hugging Face tokenizers [\d.]+ cannot read it"):
        build(config(tokenizer=str(tmp_path / "bad"), eos_token="</s>", workers=2, audit_bytes=0))


def test_the_audit_of_a_large_corpus_is_a_sample_of_bounded_size(config, corpus):
    few = context_of(config, corpus)
    assert all(few.audit_bytes(unit) == few.config.audit_bytes > 0 for unit in few.units)
    names = [f"{random.Random(number).getrandbits(128):032x}" for number in range(40_000)]
    many = replace(few, units=tuple(replace(few.units[0], name=name) for name in names))
    assert 3500 < sum(many.audit_bytes(unit) > 0 for unit in many.units) < 4500
