"""Clean a corpus with datatrove before `prep`: quality filters, near-duplicates, e-mail and IP addresses.

    python3 -m venv .venv-clean && .venv-clean/bin/pip install -r requirements/clean.txt
    .venv-clean/bin/python examples/clean.py corpus/web cleaned/web --kind en --workers 8

Reads the JSON lines (plain, .gz, .zst) or the parquet files of a folder, and writes `texts/` for the recipe of `prep`,
`removed/` with what was left out and why, and `work/` with the logs, which may be deleted afterwards. The same command
resumes, file by file. Nothing is downloaded. Exact duplicates and evaluation texts are left to `prep`.

--kind selects what judges a text, since word-based filters misjudge other languages and code:

    en    Gopher's repetition and quality filters, and FineWeb's: the filters of FineWeb
    zh    the same on Chinese words, with FineWeb 2's thresholds and stop words for Mandarin
    code  lengths of lines and the share of letters and digits, as for The Stack; IP addresses stay, since versions and
          constants look like them
    any   no quality filter: for other languages, whose thresholds are in FineWeb 2's repository, and for mixed texts
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO, Any


def stop(number: int, _: object) -> None:
    """End the program at a signal; its worker processes end with it."""
    print("\nstopped; the same command resumes", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
elif __name__ == "__mp_main__":  # a worker process, to which a terminal sends Ctrl-C too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    import orjson
    from datatrove.data import Document
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from datatrove.pipeline.writers import JsonlWriter, ParquetWriter
    from datatrove.utils.text import PUNCTUATION
    from datatrove.utils.word_tokenizers import SpaCyTokenizer, WhitespaceTokenizer
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; install requirements/clean.txt, as the head of {__file__} says")

LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")
COMPRESSED = ("", ".gz", ".zst")
KINDS = ("en", "zh", "code", "any")

LONGEST_LINE = 1 << 28  # bytes, as for `prep`
LONGEST_WORD = 1000  # characters

PR_SET_PDEATHSIG = 1  # of linux/prctl.h

MANDARIN = "cmn_Hani"  # for "zh" datatrove splits at spaces
# Of FineWeb 2, configs/cmn_Hani.yml.
MANDARIN_STOP_WORDS = list("的年在月是和日了於·為有被人中为他與後也而由")


class Counting:
    """A reader that counts the documents it reads, and those it leaves out, which datatrove does silently.

    A document carries the other keys of its record as JSON in one string, since datatrove gives some a meaning: `rank`
    would name the output file.
    """

    def documents_of(self, filepath: str) -> Iterator[Document]:
        raise NotImplementedError

    def read_file(self, filepath: str) -> Iterator[Document]:
        try:
            yield from self.documents_of(filepath)
        except Exception as error:  # noqa: BLE001 - as the library of its format reports a damaged file
            path = self.data_folder.resolve_paths(filepath)  # type: ignore[attr-defined]
            sys.exit(f"error: {path}: {one_line(error)}; repair the file or remove it from the folder")

    def get_document_from_dict(self, data: dict[str, Any], source_file: str, id_in_file: int) -> Document | None:
        self.stat_update("read")  # type: ignore[attr-defined]
        text = data.pop(self.text_key, None)  # type: ignore[attr-defined]
        if not text or not isinstance(text, str):
            self.stat_update(f"dropped_no {self.text_key}")  # type: ignore[attr-defined]
            return None
        if data.get("id") is None:
            data["id"] = f"{source_file}/{id_in_file}"
        try:
            record = orjson.dumps(data, default=str).decode()  # str: parquet has decimals, for example
        except orjson.JSONEncodeError:
            self.stat_update("dropped_record nested too deep")  # type: ignore[attr-defined]
            return None
        return Document(text, str(data["id"]), metadata={"record": record})


class CountingParquetReader(Counting, ParquetReader):  # type: ignore[misc]
    """Parquet, with the documents counted."""

    def documents_of(self, filepath: str) -> Iterator[Document]:
        yield from ParquetReader.read_file(self, filepath)


class CountingJsonlReader(Counting, JsonlReader):  # type: ignore[misc]
    """JSON lines; a broken line is counted, where datatrove would leave out the rest of the file after a bad byte."""

    def documents_of(self, filepath: str) -> Iterator[Document]:
        with self.data_folder.open(filepath, "rb", compression=self.compression) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), b"")):
                if len(line) == LONGEST_LINE:
                    raise ValueError(f"line {number + 1} has {LONGEST_LINE >> 20} MiB or more")
                record = None
                with contextlib.suppress(orjson.JSONDecodeError):
                    record = orjson.loads(line)
                if not isinstance(record, dict):
                    if line.strip():
                        self.stat_update("read", "dropped_broken line")
                elif (document := self.get_document_from_dict(record, filepath, number)) is not None:
                    yield document


class RecordWriter(JsonlWriter):  # type: ignore[misc]
    """JSON lines with the keys that a record had when it was read, and the reason if it was removed."""

    def _write(self, document: dict[str, Any], file_handler: IO[bytes], _filename: str) -> None:
        text, metadata = {"text": document["text"]}, document["metadata"]
        record = text | orjson.loads(metadata.pop("record")) | text | metadata
        file_handler.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


class WordFilter(BaseFilter):  # type: ignore[misc]
    """Remove texts with a very long word, for which the word splitters of the other filters would take hours.

    spaCy's for English takes time with the square of the characters without a space, and jieba with the square of
    those without punctuation.
    """

    name = "words"

    def __init__(self, kind: str, exclusion_writer: JsonlWriter) -> None:
        super().__init__(exclusion_writer)
        self.words = re.compile(rf"[^\s{re.escape(PUNCTUATION)}]+" if kind == "zh" else r"\S+")

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if any(len(match[0]) > LONGEST_WORD for match in self.words.finditer(doc.text)):
            return False, f"word over {LONGEST_WORD} characters"
        return True


class AddressFormatter(PIIFormatter):  # type: ignore[misc]
    """Replace e-mail and IP addresses, in linear time.

    datatrove's expression for e-mail addresses reads to the end of a word from each place in it. The condition before
    it bounds this: what precedes an `@` has up to 256 characters, and a dot follows within 63, or a bracket at once.
    """

    def __init__(self, remove_ips: bool) -> None:
        super().__init__(remove_ips=remove_ips)
        near = r"\b(?=[^\s@]{1,256}@(?:[A-Za-z0-9-]{1,63}\.|\[))"
        self.emails_replacer.regex = re.compile(near + self.emails_replacer.regex.pattern)


class CodeFilter(BaseFilter):  # type: ignore[misc]
    """The filters of The Stack: generated code and data have long lines, or few letters and digits."""

    name = "code"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        lengths = [len(line) for line in doc.text.splitlines()]
        if not lengths or max(lengths) > 1000:
            return False, "line over 1000 characters"
        if sum(lengths) / len(lengths) > 100:
            return False, "lines over 100 characters on average"
        if sum(map(str.isalnum, doc.text)) < 0.25 * len(doc.text):
            return False, "few letters and digits"
        return True


def quality_filters(kind: str, removed: Path) -> list[PipelineStep]:
    """Return the filters of a kind of text; each writes what it removes, with the reason."""

    def to(name: str) -> JsonlWriter:
        return RecordWriter(str(removed / name))

    if kind == "en":
        return [
            WordFilter(kind, to("words")),
            GopherRepetitionFilter(exclusion_writer=to("repetition")),
            GopherQualityFilter(exclusion_writer=to("quality")),
            FineWebQualityFilter(exclusion_writer=to("fineweb")),
        ]
    if kind == "zh":
        return [
            WordFilter(kind, to("words")),
            GopherRepetitionFilter(
                language=MANDARIN, dup_line_frac=0.287, dup_para_frac=0, dup_line_char_frac=0, dup_para_char_frac=0,
                top_n_grams=((2, 0.256), (3, 0.201), (4, 0.171)),
                dup_n_grams=((5, 0.198), (6, 0.182), (7, 0.167), (8, 0.154), (9, 0.14), (10, 0.127)),
                exclusion_writer=to("repetition"),
            ),
            FineWebQualityFilter(
                language=MANDARIN, line_punct_thr=0.106, short_line_thr=999, char_duplicates_ratio=0.1,
                new_line_ratio=0.178, exclusion_writer=to("fineweb"),
            ),
            GopherQualityFilter(
                language=MANDARIN, min_avg_word_length=1, max_avg_word_length=5, max_non_alpha_words_ratio=0.735,
                stop_words=MANDARIN_STOP_WORDS, exclusion_writer=to("quality"),
            ),
        ]  # fmt: skip
    return [CodeFilter(exclusion_writer=to("code"))] if kind == "code" else []


def find_files(folder: Path) -> list[str]:
    """Return the names of a folder's files, at any depth, which all have the same ending.

    Raises:
        SystemExit: no files that can be read, both JSON lines and parquet, or something that is not a file.
    """
    endings = sorted({f"{line}{compressed}" for line in LINES for compressed in COMPRESSED} | {".parquet"})
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        for ending in endings:
            if path.name.lower().endswith(ending) and not path.is_dir():
                name = path.relative_to(folder).as_posix()
                if not path.is_file():
                    raise SystemExit(f"error: {path}: not a file (a pipe, a device, a link to nothing); remove it")
                if not name.isprintable() or name != name.strip():  # a byte that is not UTF-8 is not printable
                    raise SystemExit(
                        f"error: {str(path)!r}: the name has control characters, bytes that are not UTF-8, or spaces "
                        "at its ends; rename it"
                    )
                found.setdefault(ending, []).append(name)
    if len(found) != 1:
        counts = {ending: len(names) for ending, names in found.items()}
        raise SystemExit(
            f"error: {folder}: found {counts or 'no files that can be read'}; give a folder with files of one ending "
            f"of {', '.join(endings)}"
        )
    (names,) = found.values()
    return names


class TextAndIdWriter(ParquetWriter):  # type: ignore[misc]
    """Parquet with the columns of text and id; others would have to be the same in all documents."""

    def _default_adapter(self, document: Document) -> dict[str, Any]:
        return {"text": document.text, "id": document.id}


class Workers:
    """Processes for the tasks of all steps, which end with the program, on Linux however it ends.

    datatrove's executor leaves its processes behind when it is killed, and waits indefinitely when one of them is.
    """

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(os.getpid(),))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:  # the pool would wait for the tasks that run
            for process in multiprocessing.active_children():
                process.kill()
        self._pool.shutdown(cancel_futures=True)

    def run(self, step: str, executor: LocalPipelineExecutor, files: Sequence[Path] = ()) -> None:
        """Run the tasks of a step that are not complete; `files` has the file that each of them reads.

        Raises:
            SystemExit: a task failed, or a process was killed.
        """
        tasks = {self._pool.submit(executor._run_for_rank, rank): rank for rank in executor.get_incomplete_ranks()}
        for done, task in enumerate(as_completed(tasks), 1):
            try:
                task.result()
            except BrokenProcessPool:
                sys.exit(
                    f"error: {step}: a worker process was killed, perhaps since memory was short; give fewer "
                    "--workers; the same command resumes"
                )
            except Exception as error:  # noqa: BLE001 - of any library
                rank = tasks[task]
                file = f"{files[rank]}: " if files else ""
                log = executor.logging_dir.resolve_paths(f"logs/task_{rank:05d}.log")
                if isinstance(error, OSError | MemoryError):  # such as a full disk, not the texts
                    then = "when that is repaired, the same command resumes"
                else:
                    then = "the same texts would fail again: remove what it names, and clean into another folder"
                sys.exit(f"error: {step}: {file}{one_line(error)}; the log is {log}; {then}")
            print(f"\r{step}: {done} of {len(tasks)} tasks", end="", file=sys.stderr, flush=True)
        if tasks:
            print(file=sys.stderr)


def start_worker(program: int) -> None:
    """Make a worker process end with the program, and leave its messages to the tasks' logs."""
    if sys.platform == "linux":
        # By the kernel: no Python code runs, in any thread, while `re` or another library holds the interpreter.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != program:  # it ended before
        os._exit(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which would be reported as left behind
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def one_line(error: Exception) -> str:
    """Return what an error says, which for those of libraries may be many lines."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def clean(
    folder: Path, out: Path, *, kind: str, text: str = "text", workers: int = 1, output: str = "jsonl"
) -> dict[str, int]:
    """Clean a corpus, and return the number of documents by what became of them.

    Raises:
        SystemExit: the folder cannot be read, or `out` holds a corpus that was cleaned with other settings.
    """
    names = find_files(folder)
    files, work, removed = len(names), out / "work", out / "removed"
    settings = {"folder": str(folder.resolve()), "kind": kind, "text": text, "output": output, "files": names}
    lock = claim(out, settings)
    (work / "files.txt").write_text("".join(f"{name}\n" for name in names))
    kind_of_reader = CountingParquetReader if names[0].lower().endswith(".parquet") else CountingJsonlReader
    reader = kind_of_reader(str(folder), paths_file=str(work / "files.txt"), text_key=text)
    reader.add_file_path = False  # which the parquet reader has no argument for
    minhash = MinhashConfig()  # 14 bands of 8 hashes of 5 words: a similarity of about 0.72
    # Of its own: the one that filters share has loaded jieba by then, and could not be copied with the pipeline.
    words = SpaCyTokenizer(kind) if kind in ("en", "zh") else WhitespaceTokenizer()
    kept = JsonlReader(str(work / "kept"), add_file_path=False)
    duplicates = RecordWriter(str(removed / "duplicates"))
    if output == "parquet":
        writer: PipelineStep = TextAndIdWriter(str(out / "texts"), compression="zstd")
    else:
        writer = RecordWriter(str(out / "texts"))
    # A task for each file, so that the result does not depend on the number of workers.
    steps: dict[str, tuple[list[PipelineStep], int]] = {
        "1-filter": ([reader, *quality_filters(kind, removed), JsonlWriter(str(work / "kept"))], files),
        "2-signatures": (
            [kept, MinhashDedupSignature(str(work / "signatures"), config=minhash, language=words)], files,
        ),
        "3-buckets": (
            [MinhashDedupBuckets(str(work / "signatures"), str(work / "pairs"), config=minhash)], minhash.num_buckets,
        ),
        "4-clusters": ([MinhashDedupCluster(str(work / "pairs"), str(work / "duplicates"), config=minhash)], 1),
        "5-write": (
            [
                kept,
                MinhashDedupFilter(str(work / "duplicates"), exclusion_writer=duplicates),
                AddressFormatter(remove_ips=kind != "code"),
                writer,
            ],
            files,
        ),
    }  # fmt: skip
    with Workers(min(workers, max(tasks for _, tasks in steps.values()))) as processes:
        for name, (pipeline, tasks) in steps.items():
            executor = LocalPipelineExecutor(pipeline, tasks=tasks, logging_dir=str(work / "logs" / name))
            processes.run(name, executor, [folder / file for file in names] if name == "1-filter" else [])
            if not any((work / "kept").glob("*")):
                break  # nothing is left to compare
    lock.close()
    return counts(work / "logs")


def claim(out: Path, settings: dict[str, Any]) -> IO[str]:
    """Check that `out` is for this result, and return its lock, which is held while it is open.

    Raises:
        SystemExit: `out` holds something else, or another process writes to it.
    """
    file, corpus = out / "work" / "settings.json", Path(settings["folder"])
    if corpus in (out.resolve(), *out.resolve().parents):
        sys.exit(f"error: {out}: is within the corpus, {corpus}; give another folder")
    if out.exists() and not file.parent.exists() and any(out.iterdir()):
        sys.exit(f"error: {out}: expected an empty folder or a result of this command; give another folder")
    for path in (out, *out.rglob("*")) if file.parent.exists() else ():
        if (path.is_symlink() and path != out) or not (path.is_file() or path.is_dir()):
            sys.exit(f"error: {path}: found a link, a pipe or a device, expected what this command wrote; remove {out}")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = (file.parent / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: {out}: another process writes to it; wait until it ends, or give another folder")
    if file.exists():
        try:
            before = dict(json.loads(file.read_bytes()))
        except (ValueError, TypeError):
            sys.exit(f"error: {file}: is damaged; remove {out}")
        if changed := [key for key, value in settings.items() if before.get(key) != value]:
            sys.exit(f"error: {out}: holds the result for another {', '.join(changed)} ({file}); give another folder")
    file.with_suffix(".new").write_text(json.dumps(settings))
    file.with_suffix(".new").replace(file)  # a kill leaves all of it or none
    return lock


def counts(logs: Path) -> dict[str, int]:
    """Add up the statistics of all tasks: documents read, removed by reason, and written.

    Raises:
        SystemExit: documents were lost.
    """
    total = Counter({"read": 0})
    for file in sorted((logs / "1-filter" / "stats").glob("*.json")):
        for step in json.loads(file.read_bytes()):
            for label, value in step["stats"].items():
                if label == "read" or label.startswith("dropped_"):
                    total[label.replace("dropped_", "removed: ")] += _sum(value)
    written = 0
    for file in sorted((logs / "5-write" / "stats").glob("*.json")):
        steps = json.loads(file.read_bytes())
        total["removed: near-duplicate"] += sum(_sum(step["stats"].get("dropped", 0)) for step in steps)
        written += _sum(steps[-1]["stats"].get("total", 0))
    removed = total.total() - total["read"]
    if total["read"] != removed + written:
        raise SystemExit(f"error: {logs}: {total['read']} documents were read, {removed} removed and {written} written")
    return {**total, "written": written}


def _sum(value: Any) -> int:
    return int(value["total"] if isinstance(value, dict) else value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of JSON lines or parquet files, searched at any depth")
    parser.add_argument("out", type=Path, help="folder for the result")
    parser.add_argument("--kind", choices=KINDS, required=True, help="which filters: see the head of this file")
    parser.add_argument("--text", default="text", help="key or column of the text (default: text)")
    parser.add_argument("--output", choices=["jsonl", "parquet"], default="jsonl", help="format (default: jsonl)")
    parser.add_argument("--workers", type=int, default=1, help="number of processes (default: 1)")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers: found {options.workers}, expected 1 or more")
    try:
        found = clean(
            options.folder, options.out, kind=options.kind, text=options.text, workers=options.workers,
            output=options.output,
        )  # fmt: skip
    except OSError as error:  # a folder that cannot be read or written
        sys.exit(f"error: {error}")
    for name, count in found.items():
        print(f"{count:12,}  {name}")
    if found["written"]:
        print(f"the source of a recipe: {{paths: {options.out / 'texts'}}}")
    return 0 if found["written"] else 1


if __name__ == "__main__":
    sys.exit(main())
