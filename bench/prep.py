"""Preparation against its peers: the same files, whole commands with their start-up, in one run.

    python -m venv .venv-peers
    .venv-peers/bin/pip install 'datatrove[io]==0.10.0' datasets transformers
    python bench/prep.py --corpus CORPUS --tokenizer FOLDER

The corpus (folders of .jsonl, .json, .gz, .parquet files with `text`) is first written as parquet and as .jsonl.gz, one
folder for each of its sources. The slow peers get a part of it: the first files of each source.

Ours is `python -m prep build` with packing, zstd, hashes and manifest. What it wrote is verified, and its tokens are
compared with datatrove's; no figure is printed if either fails. MB are 10^6 bytes of UTF-8 text read.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

# Nothing is imported from this file's own folder: its name would hide the package.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from prep.config import SourceConfig  # noqa: E402
from prep.dataset.verification import verify  # noqa: E402
from prep.inputs.readers import read_unit  # noqa: E402
from prep.inputs.units import plan_units  # noqa: E402
from streaming_rwkv.tokenizer import load_tokenizer  # noqa: E402

HERE = Path(__file__).parent
FILE_BYTES = 16_000_000
# Measured elsewhere, on two cores and another corpus. A re-stated program that is much slower is no baseline.
KNOWN_MB_PER_SECOND = {"datatrove": 3.3, "llm_foundry": 2.3, "rwkvinllama": 0.24}
RESTATED = ("llm_foundry", "rwkvinllama")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measurement of one command on one input."""

    name: str
    input: str
    megabytes: float
    seconds: float
    startup_seconds: float
    cpu_seconds: float
    peak_megabytes: float

    @property
    def speed(self) -> float:
        return self.megabytes / self.seconds


def main() -> int:
    options = _options()
    work = Path(options.work)
    inputs = prepare_inputs(options.corpus, work / "input", part_bytes=options.part_megabytes * 1e6)
    commands = {
        "prep": _our_command,
        "datatrove": _peer("datatrove_tokens.py", options.peers_python),
        "llm_foundry": _peer("llm_foundry_loop.py", sys.executable),
        "rwkvinllama": _peer("rwkvinllama_steps.py", options.peers_python),
    }
    plan = [(name, kind) for kind in ("parquet", "jsonl") for name in commands if name in options.only]
    results = []
    for name, kind in plan:
        whole = name in ("prep", "datatrove")
        folder = inputs / kind / ("all" if whole else "part")
        if kind == "jsonl" and name == "rwkvinllama":
            continue  # its second step is the same, and its first converts to parquet
        startup, _, _ = _run(commands[name], inputs / kind / "tiny", work / "out" / name, options)
        runs = [_run(commands[name], folder, work / "out" / name, options) for _ in range(options.repeats)]
        seconds, cpu_seconds, peak = min(runs)
        size = json.loads((folder / "size.json").read_text())["text_bytes"] / 1e6
        measured = Measured(
            name=name,
            input=f"{kind}/{folder.name}",
            megabytes=size,
            seconds=seconds,
            startup_seconds=startup,
            cpu_seconds=cpu_seconds,
            peak_megabytes=peak / 1e6,
        )
        results.append(measured)
        print(f"{measured.input:14} {name:12} {measured.speed:7.2f} MB/s", flush=True)
        if name == "prep":
            verify(work / "out" / "prep")
        if name == "datatrove" and "prep" in options.only:
            check_tokens(work / "out", options)
    show(results)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json")
    parser.add_argument("--work", default="/tmp/bench-prep")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="the number of runs; the best one counts")
    parser.add_argument("--part-megabytes", type=float, default=12)
    parser.add_argument("--peers-python", default=".venv-peers/bin/python")
    parser.add_argument("--only", nargs="+", default=["prep", *KNOWN_MB_PER_SECOND])
    parser.add_argument("--json", help="write the figures here, too")
    return parser.parse_args()


# --- input ---


def prepare_inputs(corpus: str, folder: Path, *, part_bytes: float) -> Path:
    """Write {parquet,jsonl}/{all,part,tiny}/SOURCE/NNN.*, once."""
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    sources = sorted({file.parent for file in Path(corpus).rglob("*") if file.is_file() and "." in file.name})
    sizes = {"all": 0, "part": 0, "tiny": 0}
    for source in sources:
        name = "-".join(source.relative_to(corpus).parts)
        written = 0
        for number, texts in enumerate(_files_of_texts(source)):
            size = sum(len(text.encode()) for text in texts)
            wanted = {"all": texts}
            if written < part_bytes / len(sources):
                share = max(1, int(len(texts) * min(1.0, part_bytes / len(sources) / size)))
                wanted["part"] = texts[:share]
            if number == 0 and source == sources[0]:
                wanted["tiny"] = texts[:10]
            written += size
            for kind, chosen in wanted.items():
                sizes[kind] += sum(len(text.encode()) for text in chosen)
                _write(folder, kind, name, number, chosen)
    for kind, size in sizes.items():
        for form in ("parquet", "jsonl"):
            (folder / form / kind / "size.json").write_text(json.dumps({"text_bytes": size}))
    (folder / "done").touch()
    return folder


def _files_of_texts(source: Path) -> Iterator[list[str]]:
    config = SourceConfig(paths=[str(source)])
    texts: list[str] = []
    size = 0
    for unit in plan_units({"source": config}, unit_bytes=FILE_BYTES):
        for documents in read_unit(unit, config):
            texts += documents.texts
            size += sum(map(len, documents.texts))
            if size >= FILE_BYTES // 2:
                yield texts
                texts, size = [], 0
    if texts:
        yield texts


def _write(folder: Path, kind: str, source: str, number: int, texts: list[str]) -> None:
    parquet = folder / "parquet" / kind / source / f"{number:03}.parquet"
    lines = folder / "jsonl" / kind / source / f"{number:03}.jsonl.gz"
    for file in (parquet, lines):
        file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), parquet)
    lines.write_bytes(gzip.compress(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts), 6))


# --- runs ---

Command = Callable[[Path, Path, argparse.Namespace], list[str]]


def _our_command(folder: Path, out: Path, options: argparse.Namespace) -> list[str]:
    sources = {path.name: {"paths": str(path)} for path in sorted(folder.iterdir()) if path.is_dir()}
    config = {
        "out": str(out),
        "tokenizer": options.tokenizer,
        "sources": sources,
        "workers": options.workers,
        "deduplicate": "none",  # the peers keep duplicates, and the tokens are to be compared
    }
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps(config))
    return [sys.executable, "-m", "prep", "build", str(recipe)]


def _peer(script: str, python: str) -> Command:
    def command(folder: Path, out: Path, options: argparse.Namespace) -> list[str]:
        eos = json.loads((Path(options.tokenizer) / "tokenizer_config.json").read_text())["eos_token"]
        arguments = [str(folder), str(out), options.tokenizer, eos, str(options.workers)]
        return [python, str(HERE / "prep_peers" / script), *arguments]

    return command


def _run(command: Command, folder: Path, out: Path, options: argparse.Namespace) -> tuple[float, float, float]:
    """Measure (seconds, CPU seconds, peak bytes of all processes) of a whole command on a fresh output folder."""
    cache = out.with_suffix(".cache")  # what `datasets` keeps would let the next run skip its work
    for left in (out, cache):
        shutil.rmtree(left, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
    arguments = command(folder, out, options)
    log = out.with_suffix(".log")
    began, cpu_before = time.monotonic(), _cpu_seconds_of_children()
    with log.open("w") as stream:
        process = psutil.Popen(arguments, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _proportional_bytes(process))
            time.sleep(0.5)
    seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{log.read_text()[-3000:]}")
    return seconds, _cpu_seconds_of_children() - cpu_before, peak


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _proportional_bytes(process: psutil.Process) -> float:
    total = 0.0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_full_info().pss
    except psutil.Error:
        pass  # it ended while we looked
    return total


def check_tokens(out: Path, options: argparse.Namespace) -> None:
    """datatrove stores the same ids, one eos after each document: their number and sum must be ours."""
    tokenizer = load_tokenizer(options.tokenizer)
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    theirs = [np.fromfile(file, dtype) for file in sorted((out / "datatrove" / "tokens").glob("*.ds"))]
    manifest = verify(out / "prep")
    ours = sum(book.targets_read for book in manifest.counts.values())
    found = sum(len(ids) for ids in theirs)
    if ours != found:
        raise SystemExit(f"prep has {ours:,} tokens and ends, datatrove {found:,}: not the same work, no comparison")


def show(results: list[Measured]) -> None:
    head = ("input", "pipeline", "MB", "s", "start-up s", "CPU s", "MB/s", "peak MB", "prep is")
    print("\n" + _line(head))
    speeds = {(result.input.split("/")[0], result.name): result.speed for result in results}
    for result in results:
        ours = speeds.get((result.input.split("/")[0], "prep"))
        ratio = f"{ours / result.speed:.1f}x" if ours and result.name != "prep" else ""
        known = KNOWN_MB_PER_SECOND.get(result.name, 0)
        doubt = ""
        if result.speed < 0.8 * known:
            doubt = f"  known: {known} MB/s" + (", so no baseline" if result.name in RESTATED else "")
        figures = (result.megabytes, result.seconds, result.startup_seconds, result.cpu_seconds)
        shown = [f"{figure:.1f}" for figure in figures]
        print(
            _line((result.input, result.name, *shown, f"{result.speed:.2f}", f"{result.peak_megabytes:.0f}", ratio))
            + doubt
        )


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:14} {cells[1]:12} " + " ".join(f"{cell:>10}" for cell in cells[2:])


if __name__ == "__main__":
    sys.exit(main())
