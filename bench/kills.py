"""Kill a training loop at random moments until it has finished, and compare it with one that was never killed.

    python -m bench.kills --kills 200

The loop is a run without Composer, whose start alone takes ten seconds: the plan, a forked loader worker, the model,
AdamW, and checkpoints by `train.checkpoints`. Every process gets SIGKILL, and is waited for before the next start.
The packs of every step and the final weights are compared bit for bit.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from prep.build import build
from prep.commands.train_tokenizer import train_tokenizer
from prep.config import PrepConfig, SourceConfig
from streaming_rwkv.data.loader import LoaderOptions, PackDataset, data_spec
from streaming_rwkv.data.mixture import StageConfig, make_plan
from streaming_rwkv.data.shard_set import open_shard_set
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.weights import read_state
from streaming_rwkv.storage import Store
from streaming_rwkv.train.checkpoints.local import load_checkpoint, newest_checkpoint, save_checkpoint
from streaming_rwkv.train.checkpoints.record import Progress
from streaming_rwkv.train.checkpoints.restore import restore
from streaming_rwkv.train.checkpoints.uploader import Mirror
from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import build_optimizer

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
BATCH_PACKS = 2
SEED = 5


def make_data(folder: Path) -> Path:
    config = make_corpus(folder)
    build(config)
    return Path(config.out)


def make_corpus(folder: Path) -> PrepConfig:
    """Write a corpus and its tokenizer, and return the recipe of a data set of them."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(300)]
    for source in ("web", "code"):
        path = folder / "corpus" / source / "text.jsonl"
        path.parent.mkdir(parents=True)
        texts = (" ".join(rng.choices(words, k=rng.randint(1, 120))) for _ in range(900))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = {name: SourceConfig(paths=[str(folder / "corpus" / name)]) for name in ("web", "code")}
    train_tokenizer(sources, vocab_size=320, to=folder / "tokenizer")
    return PrepConfig(
        out=str(folder / "shards"), tokenizer=str(folder / "tokenizer"), sources=sources, edges=[64, 128, 512],
        pack_tokens=512, shard_bytes=1 << 13, workers=1,
    )  # fmt: skip


def train(
    data: str | Path, folder: Path, *, log: Path, store: Store | None = None, cache_limit: int | None = None
) -> None:
    """Train from the newest checkpoint, on this machine or in `store`, to the end."""
    torch.set_num_threads(1)
    shard_set = open_shard_set(data, cache=folder / "cache", splits=("train",), timeout_seconds=30, fetch=True)
    stages = [
        StageConfig(passes=0.4),
        StageConfig(tokens=30_000, sources={"web": 0.8, "code": 0.2}),
        StageConfig(tokens=40_000, buckets={"1-64": 0.4, "65-128": 0.1, "129-512": 0.5}),
    ]
    records = shard_set.manifest.select("train")
    plan = make_plan(stages, records, batch_packs=BATCH_PACKS, seed=SEED, block_shards=2)
    dataset = PackDataset(
        shard_set, records, batches=plan.packs, num_batches=plan.steps, batch_packs=BATCH_PACKS,
        options=LoaderOptions(fetch_ahead=8, cache_limit=cache_limit, download_attempts=2, timeout_seconds=30),
    )  # fmt: skip
    model = RWKV7(RWKV7Config(vocab_size=320, hidden_size=64, num_layers=1))
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3))
    checkpoint, in_store = restore(store, folder) if store else (newest_checkpoint(folder / "checkpoints"), False)
    mirror = Mirror(store, folder, keep=2) if store else None
    if mirror and checkpoint and not in_store:
        mirror.begin(checkpoint.path, all_on_rank_zero=True)
    step = 0
    if checkpoint is None:
        initialize(model, seed=SEED)
    else:
        load_checkpoint(checkpoint, model=model, optimizer=optimizer)
        step = checkpoint.step
        dataset.start_at(step)
    with open(log, "a", buffering=1) as lines:
        for batch in data_spec(dataset, workers=1, timeout_seconds=30).dataloader:
            nll = model(batch["tokens"], cu_seqlens=batch["cu_seqlens"], targets=batch["targets"])
            (nll.sum() / batch["num_targets"]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            lines.write(f"{step} {batch['tokens'].sum().item()} {batch['streams'].tolist()}\n")
            if mirror and mirror.failed:
                raise mirror.error()
            if mirror and not mirror.busy:
                mirror.advance()
            if step % 5 == 0 or step == plan.steps:
                if mirror and not mirror.settle():
                    raise mirror.error()
                progress = Progress(step=step, tokens=0, samples=0, slots=step * BATCH_PACKS, seconds=0, consumed={})
                path = save_checkpoint(
                    folder / "checkpoints", model=model, optimizer=optimizer, progress=progress, run={}, keep=2
                )
                if mirror:
                    mirror.begin(path)
    if mirror:
        mirror.finish()
    (folder / "finished").touch()


def start(data: Path, folder: Path) -> int:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            train(data, folder, log=log_of(folder))
            status = 0
        finally:
            os._exit(status)
    return process


def kill_all(group: int) -> int:
    """Kill the loop's group; its loader workers, in groups of their own, die with it. Return the number of processes.

    This process waits for all of them, orphans too: none is left when this returns.
    """
    os.killpg(group, signal.SIGKILL)
    count = 0
    while True:
        try:
            os.waitpid(-1, 0)
            count += 1
        except ChildProcessError:
            return count


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def steps_of(log: Path) -> dict[int, set[str]]:
    """Return the data that each step saw, in every start that reached it."""
    steps: dict[int, set[str]] = {}
    for line in log.read_text().splitlines():
        number, _, seen = line.partition(" ")
        steps.setdefault(int(number), set()).add(seen)
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # a loader worker whose parent was killed comes to us
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data = make_data(root)
        quiet = root / "quiet"
        quiet.mkdir()
        began = time.perf_counter()
        assert os.waitstatus_to_exitcode(os.waitpid(start(data, quiet), 0)[1]) == 0
        seconds = time.perf_counter() - began
        expected = steps_of(log_of(quiet))
        last = max(expected)
        kills = processes = runs = 0
        while kills < options.kills:
            runs += 1
            folder = root / f"run{runs}"
            folder.mkdir()
            while not (folder / "finished").exists():
                child = start(data, folder)
                deadline = time.perf_counter() + rng.uniform(0.05, min(3.0, seconds / 3))
                while time.perf_counter() < deadline and not (folder / "finished").exists():
                    time.sleep(0.005)
                count = kill_all(child)
                if not (folder / "finished").exists():
                    kills, processes = kills + 1, processes + count
            found = steps_of(log_of(folder))
            assert found == expected, [step for step in expected if found.get(step) != expected[step]]
            name = f"checkpoints/step-{last:08d}"
            before, after = read_state(quiet / name), read_state(folder / name)
            assert all(torch.equal(before[key], after[key]) for key in before)
            print(f"run {runs}: {last} steps, {kills} kills so far: same packs, same weights", flush=True)
    print(f"{kills} kills, {processes} processes killed, {runs} runs of {last} steps: all bitwise as the quiet one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
