"""Clean a corpus with datatrove before `prep`: quality filters, near-duplicates, e-mail and IP addresses.

    python3 -m venv .venv-clean && .venv-clean/bin/pip install -r requirements/clean.txt
    .venv-clean/bin/python examples/clean.py corpus/web cleaned/web --kind en --workers 8

Reads the JSON lines (plain, .gz, .zst) or the parquet files of a folder, and writes `texts/` for the recipe of `prep`,
`removed/` with what was left out and why, and `work/`, which may be deleted afterwards. The same command resumes, file
by file. Nothing is downloaded. Exact duplicates and evaluation texts are left to `prep`.

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
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    from datatrove.utils.word_tokenizers import SpaCyTokenizer, WhitespaceTokenizer
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; install requirements/clean.txt, as the head of {__file__} says")

LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")
COMPRESSED = ("", ".gz", ".zst")
KINDS = ("en", "zh", "code", "any")

MANDARIN = "cmn_Hani"  # for "zh" datatrove splits at spaces
# Of FineWeb 2, configs/cmn_Hani.yml.
MANDARIN_STOP_WORDS = list("的年在月是和日了於·為有被人中为他與後也而由")


class Counting:
    """A reader that counts the documents it reads, and those without a text, which datatrove leaves out silently."""

    def get_document_from_dict(self, data: dict[str, Any], source_file: str, id_in_file: int) -> Document | None:
        self.stat_update("read")  # type: ignore[attr-defined]
        document = super().get_document_from_dict(data, source_file, id_in_file)  # type: ignore[misc]
        if document is not None and isinstance(document.text, str):
            return document
        self.stat_update(f"dropped_no {self.text_key}")  # type: ignore[attr-defined]
        return None


class CountingParquetReader(Counting, ParquetReader):  # type: ignore[misc]
    """Parquet, with the documents counted."""


class CountingJsonlReader(Counting, JsonlReader):  # type: ignore[misc]
    """JSON lines; a broken line is counted, where datatrove would leave out the rest of the file after a bad byte."""

    def read_file(self, filepath: str) -> Iterator[Document]:
        with self.data_folder.open(filepath, "rb", compression=self.compression) as lines:
            for number, line in enumerate(lines):
                record = None
                with contextlib.suppress(orjson.JSONDecodeError):
                    record = orjson.loads(line)
                if not isinstance(record, dict):
                    if line.strip():
                        self.stat_update("read", "dropped_broken line")
                elif (document := self.get_document_from_dict(record, filepath, number)) is not None:
                    yield document


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
        return JsonlWriter(str(removed / name))

    if kind == "en":
        return [
            GopherRepetitionFilter(exclusion_writer=to("repetition")),
            GopherQualityFilter(exclusion_writer=to("quality")),
            FineWebQualityFilter(exclusion_writer=to("fineweb")),
        ]
    if kind == "zh":
        return [
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


def find_reader(folder: Path, *, text: str) -> tuple[PipelineStep, int]:
    """Return the reader of a folder, and the number of its files.

    Raises:
        SystemExit: no files that can be read, or both JSON lines and parquet.
    """
    names = [path.name.lower() for path in folder.rglob("*") if path.is_file()]
    endings = {f"{line}{compressed}" for line in LINES for compressed in COMPRESSED}
    found = Counter(ending for name in names for ending in {*endings, ".parquet"} if name.endswith(ending))
    if len(found) != 1:
        raise SystemExit(
            f"error: {folder}: found {dict(found) or 'no files that can be read'}; give a folder with files of one "
            f"ending of {', '.join(sorted(endings))}, .parquet"
        )
    ((ending, count),) = found.items()
    kind = CountingParquetReader if ending == ".parquet" else CountingJsonlReader
    reader = kind(str(folder), glob_pattern=f"**/*{ending}", text_key=text)
    reader.add_file_path = False  # which the parquet reader has no argument for
    return reader, count


def text_and_id(writer: PipelineStep, document: Document) -> dict[str, Any]:
    """Return the columns of parquet files, whose other columns would have to be the same in all documents."""
    return {"text": document.text, "id": document.id}


def clean(
    folder: Path, out: Path, *, kind: str, text: str = "text", workers: int = 1, output: str = "jsonl"
) -> dict[str, int]:
    """Clean a corpus, and return the number of documents by what became of them.

    Raises:
        SystemExit: the folder cannot be read, or `out` holds a corpus that was cleaned with other settings.
    """
    reader, files = find_reader(folder, text=text)
    settings = {"folder": str(folder.resolve()), "files": files, "kind": kind, "text": text, "output": output}
    check_same(out / "work" / "settings.json", settings)
    work, removed = out / "work", out / "removed"
    minhash = MinhashConfig()  # 14 bands of 8 hashes of 5 words: a similarity of about 0.72
    # Of its own: the one that filters share has loaded jieba by then, and could not be copied with the pipeline.
    words = SpaCyTokenizer(kind) if kind in ("en", "zh") else WhitespaceTokenizer()
    kept = JsonlReader(str(work / "kept"), add_file_path=False)
    if output == "parquet":
        writer: PipelineStep = ParquetWriter(str(out / "texts"), adapter=text_and_id, compression="zstd")
    else:
        writer = JsonlWriter(str(out / "texts"), expand_metadata=True)
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
                MinhashDedupFilter(str(work / "duplicates"), exclusion_writer=JsonlWriter(str(removed / "duplicates"))),
                PIIFormatter(remove_ips=kind != "code"),
                writer,
            ],
            files,
        ),
    }  # fmt: skip
    for name, (pipeline, tasks) in steps.items():
        logs = work / "logs" / name
        LocalPipelineExecutor(
            pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=str(logs), start_method="spawn"
        ).run()
        if not any((work / "kept").glob("*")):
            break  # nothing is left to compare
    return counts(work / "logs")


def check_same(file: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or compare them with those of the corpus that is there."""
    if file.exists() and (before := json.loads(file.read_bytes())) != settings:
        raise SystemExit(f"error: {file}: found {before}, expected {settings}; give another folder for the result")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".new").write_text(json.dumps(settings))
    file.with_suffix(".new").replace(file)  # a kill leaves all of it or none


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
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and end the worker processes
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
