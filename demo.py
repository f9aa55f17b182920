"""Demo, `make demo`: real text → tokenizer → shards → a short training run → a generated text.

Every step is a command that a user would run, and is printed before it runs. When the demo is run again, it resumes
where it was stopped, or reports that it is finished. It needs no network, GPU or server.
"""

from __future__ import annotations

import itertools
import json
import math
import pydoc_data.topics
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from streaming_rwkv.extras import BASE, TRAIN, exit_if_missing

if __name__ == "__main__":
    exit_if_missing(*BASE, *TRAIN, extra="train")  # before imports that would end in a traceback

import numpy as np

from prep.dataset.shard_reader import read_shard
from streaming_rwkv.filesystem import atomic_file
from streaming_rwkv.shards import offsets_of, read_manifest

HERE = Path(__file__).resolve().parent
OUT = Path("demo-out")
VOCAB_SIZE = 4096


def run(*arguments: str) -> None:
    """Run `streaming-rwkv` with these arguments, and print the command as it can be typed here."""
    beside = Path(sys.prefix, "bin", "streaming-rwkv")
    shown = beside.relative_to(HERE) if beside.is_relative_to(HERE) else beside
    print(f"\n$ {shlex.join([str(shown), *arguments])}", flush=True)
    status = subprocess.call([sys.executable, "-m", "streaming_rwkv", *arguments], cwd=HERE)
    if status:
        sys.exit(status)


def collect(corpus: Path) -> None:
    """Write the standard library's sources and the language reference as JSON lines with a `text` each."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    sources = sorted(p for p in library.rglob("*.py") if not skipped & set(p.relative_to(library).parts))
    texts = {
        "python-library": (p.read_text(encoding="utf-8", errors="replace") for p in sources),
        "python-manual": (text for _, text in sorted(pydoc_data.topics.topics.items())),
    }
    for source, documents in texts.items():
        folder = corpus / source
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "documents.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents if text.strip())


def unigram_entropy(shards: Path) -> float:
    """Return the nats per token of the best model without context, from the validation tokens' frequencies."""
    manifest = read_manifest(shards)
    counts = np.zeros(manifest.tokenizer.vocab_size)
    for stream in manifest.select("validation"):
        for pack in itertools.chain.from_iterable(
            read_shard(shards / stream.path / s.basename, s) for s in stream.shards
        ):
            targets = np.delete(pack["tokens"], offsets_of(pack["lengths"])[:-1])  # all except each piece's first
            counts += np.bincount(targets, minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def report(run_folder: Path) -> None:
    metrics = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss/train/total"] for m in metrics if "loss/train/total" in m]
    validation = [m["validation/loss/all"] for m in metrics if "validation/loss/all" in m]
    bits = [m["validation/bits_per_byte/all"] for m in metrics if "validation/bits_per_byte/all" in m]
    rates = [m["throughput/tokens_per_second"] for m in metrics if "throughput/tokens_per_second" in m]
    entropy = unigram_entropy(OUT / "shards")
    print(
        f"""
loss          first step {losses[0]:.3f} (ln {VOCAB_SIZE} = {math.log(VOCAB_SIZE):.3f}), last step {losses[-1]:.3f}
validation    first {validation[0]:.3f}, last {validation[-1]:.3f} nats per token, {bits[-1]:.3f} bits per byte
unigram       {entropy:.3f} nats per token on the same data: the model is {entropy - validation[-1]:.2f} below
speed         {sorted(rates)[len(rates) // 2]:,.0f} tokens/s
corpus        {OUT / "corpus"}
shards        {OUT / "shards"}      look inside: streaming-rwkv inspect {OUT / "shards"}
checkpoints   {run_folder / "checkpoints"}
metrics       {run_folder / "metrics.jsonl"}, tensorboard --logdir {run_folder / "tensorboard"}"""
    )


def main() -> None:
    if not (OUT / "corpus/python-manual/documents.jsonl").exists():
        print(f"collecting text into {OUT / 'corpus'}", flush=True)
        collect(HERE / OUT / "corpus")
    if not (OUT / "tokenizer/tokenizer.json").exists():
        run("train-tokenizer", "yamls/prep/demo.yaml", "--vocab-size", str(VOCAB_SIZE), "--to", str(OUT / "tokenizer"))
    run("prepare", "yamls/prep/demo.yaml")
    run("train", "yamls/demo.yaml")
    run("generate", str(OUT / "run"), "def main():", "--max-tokens", "60")
    report(OUT / "run")


if __name__ == "__main__":
    main()
