"""Tokens per second of one loader process, from local shards to finished batches; time to the first batch.

    python bench/loader.py                            # a data set of its own: 4000 packs of about 8192 tokens, uint32
    python bench/loader.py --data DATA_SET --workers 2

In the same run, one after another, all from shards that are stored expanded on the local disk:

    ours          PackDataset and collate: order, checks, cu_seqlens, targets; int64, ready for the model
    open_dataset  the same through the Python interface
    streaming     StreamingDataset as it comes, shuffled, and a collate that only joins the tokens, as int64
    litdata       litdata's StreamingDataset with TokensLoader, shuffled, in blocks of the mean pack; default collate

Each is read once before it is timed. A figure is the tokens of a run's batches but the first, over the time from the
first to the last; the median of `--repeats`. Time to the first batch is from opening the manifest, with imports done.
litdata comes with `pip install -e .[bench]`; without it that row is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter, Stream, StreamingDataset
from torch.utils.data import DataLoader

from streaming_rwkv.data.loader import LoaderOptions, PackDataset, data_spec, training_batches
from streaming_rwkv.data.mixture import StageConfig, make_plan
from streaming_rwkv.data.shard_set import open_shard_set
from streaming_rwkv.data.steps import open_dataset
from streaming_rwkv.mds import read_index
from streaming_rwkv.shards import (
    FORMAT,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    StreamRecord,
    TokenizerRecord,
    columns,
    offsets_of,
    parse_manifest,
    stream_path,
)
from tests.source_counts import counts_of

VOCAB_SIZE = 128_256
PACK_TOKENS = 8192


def write_data_set(folder: Path, *, streams: int, packs: int, shard_bytes: int) -> Path:
    """`streams` streams with `packs` packs each, of documents of 32 … 1024 random tokens."""
    rng = np.random.default_rng(0)

    def generate() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(packs):
            lengths = rng.integers(32, 1025, PACK_TOKENS // 32)
            lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), PACK_TOKENS, side="right"))]
            pieces = len(lengths)
            tokens = rng.integers(0, VOCAB_SIZE, int(lengths.sum()) + pieces).astype(np.uint32)
            tokens[offsets_of(lengths + 1)[:-1]] = 0  # bos
            yield {
                "tokens": tokens,
                "lengths": (lengths + 1).astype(np.uint32),
                "starts": np.zeros(pieces, np.uint32),
                "bytes": (4 * lengths).astype(np.uint32),
                "keys": rng.integers(0, 1 << 62, pieces).astype(np.uint64),
            }

    records = []
    for number in range(streams):
        source = f"source-{number}"
        path = folder / stream_path("train", source, "1-1024")
        written = list(generate())
        with MDSWriter(
            out=str(path),
            columns=columns(VOCAB_SIZE),
            compression="zstd:1",
            hashes=["sha256"],
            size_limit=shard_bytes,
        ) as writer:
            for pack in written:
                writer.write(pack)
        index = (path / INDEX_NAME).read_bytes()
        pieces = sum(len(pack["lengths"]) for pack in written)
        record = StreamRecord(
            split="train",
            source=source,
            lower=1,
            upper=1024,
            documents=pieces,
            pieces=pieces,
            targets=sum(len(pack["tokens"]) for pack in written) - pieces,
            bytes=sum(int(pack["bytes"].sum()) for pack in written),
            packs=packs,
            index_sha256=hashlib.sha256(index).hexdigest(),
            shards=read_index(index, vocab_size=VOCAB_SIZE, where=str(path)),
        )
        records.append(record)
    manifest = Manifest(
        format=FORMAT,
        pack_tokens=PACK_TOKENS,
        edges=[1024],
        tokenizer=TokenizerRecord(
            kind="huggingface", name="random", sha256="0" * 64, vocab_size=VOCAB_SIZE, bos_id=0, eos_id=0
        ),
        config={},
        counts=counts_of(records),
        streams=records,
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return folder


@contextmanager
def opened(data: Path, cache: Path, *, batch_packs: int, passes: float, start: int = 0) -> Iterator[PackDataset]:
    """Open our data set at step `start`; afterwards release its lock and shared memory."""
    shard_set = open_shard_set(data, cache=cache, splits=("train",), timeout_seconds=60, fetch=True)
    records = shard_set.manifest.select("train")
    plan = make_plan([StageConfig(passes=passes)], records, batch_packs=batch_packs, seed=1, block_shards=4)
    batches, num_batches = training_batches(plan)
    dataset = PackDataset(
        shard_set,
        records,
        batches=batches,
        num_batches=num_batches,
        batch_packs=batch_packs,
        options=LoaderOptions(fetch_ahead=64, download_attempts=1, timeout_seconds=60),
    )
    dataset.start_at(min(start, num_batches - 1))
    try:
        yield dataset
    finally:
        assert shard_set.lock is not None
        shard_set.lock.release()
        dataset.close()


def rate(batches: Iterable[Any], tokens_of: Callable[[Any], int]) -> float:
    """Return tokens per second from the first batch to the last."""
    iterator = iter(batches)
    next(iterator)
    began, tokens = time.perf_counter(), 0
    for batch in iterator:
        tokens += tokens_of(batch)
    return tokens / (time.perf_counter() - began)


def our_rates(data: Path, folder: Path, *, batch_packs: int, workers: int, repeats: int) -> list[float]:
    with opened(data, folder / "ours", batch_packs=batch_packs, passes=1) as dataset:
        loader = data_spec(dataset, workers=workers, timeout_seconds=60).dataloader
        rate(loader, lambda batch: batch["tokens"].numel())
        return [rate(loader, lambda batch: batch["tokens"].numel()) for _ in range(repeats)]


def interface_rates(data: Path, folder: Path, *, batch_packs: int, workers: int, repeats: int) -> list[float]:
    with open_dataset(data, batch_packs=batch_packs, workers=workers, cache=folder / "open", seed=1) as dataset:
        rates = []
        for _ in range(1 + repeats):
            dataset.start_at(0)
            rates.append(rate(dataset, lambda batch: batch["tokens"].numel()))
        return rates[1:]


def first_batch_seconds(data: Path, folder: Path, *, batch_packs: int, workers: int, resume: bool) -> float:
    """Return the seconds to a batch in the training process, with the data alone or, to resume, with a cache."""
    cache = folder / ("ours" if resume else "fresh")
    began = time.perf_counter()
    with opened(data, cache, batch_packs=batch_packs, passes=100, start=12_345 if resume else 0) as dataset:
        next(iter(data_spec(dataset, workers=workers, timeout_seconds=60).dataloader))
        return time.perf_counter() - began


def join_tokens(packs: list[dict[str, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([pack["tokens"] for pack in packs]).astype(np.int64))


def streaming_rates(data: Path, folder: Path, *, batch_packs: int, workers: int, repeats: int) -> list[float]:
    records = parse_manifest((data / MANIFEST_NAME).read_bytes(), where=str(data)).select("train")
    dataset = StreamingDataset(
        streams=[Stream(remote=str(data / r.path), local=str(folder / "streaming" / r.path)) for r in records],
        batch_size=batch_packs,
        shuffle=True,
        num_canonical_nodes=1,
    )
    loader = DataLoader(
        dataset,
        batch_size=batch_packs,
        num_workers=workers,
        collate_fn=join_tokens,
        prefetch_factor=4 if workers else None,
    )
    rate(loader, torch.Tensor.numel)
    return [rate(loader, torch.Tensor.numel) for _ in range(repeats)]


def litdata_rates(
    folder: Path, *, tokens: int, block: int, batch_packs: int, workers: int, repeats: int
) -> list[float] | None:
    try:
        import litdata
    except ImportError:
        print("litdata is not installed (`pip install -e .[bench]`): its row is left out")
        return None
    target = folder / "litdata"
    litdata.optimize(
        fn=_random_tokens,
        inputs=[(seed, 64 * block) for seed in range(max(1, tokens // (64 * block)))],
        output_dir=str(target),
        chunk_size=64 * block,
        item_loader=litdata.TokensLoader(),
        num_workers=1,
        verbose=False,
    )
    dataset = litdata.StreamingDataset(str(target), item_loader=litdata.TokensLoader(block), shuffle=True)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=batch_packs, num_workers=workers, **({"prefetch_factor": 4} if workers else {})
    )
    rate(loader, torch.Tensor.numel)
    return [rate(loader, torch.Tensor.numel) for _ in range(repeats)]


def _random_tokens(seed_and_size: tuple[int, int]) -> torch.Tensor:
    seed, size = seed_and_size
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB_SIZE, size).astype(np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data set that prep built; by default one is generated")
    parser.add_argument("--packs", type=int, default=4000)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--shard-bytes", type=int, default=1 << 22)
    parser.add_argument("--batch-packs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as scratch:
        folder = Path(scratch)
        data = options.data or write_data_set(
            folder / "data",
            streams=options.streams,
            packs=options.packs // options.streams,
            shard_bytes=options.shard_bytes,
        )
        records = parse_manifest((data / MANIFEST_NAME).read_bytes(), where=str(data)).select("train")
        tokens, packs = sum(r.targets for r in records), sum(r.packs for r in records)
        print(
            f"{len(records)} streams, {sum(len(r.shards) for r in records)} shards, {packs} packs, {tokens:,} tokens; "
            f"batches of {options.batch_packs} packs, {options.workers} workers, median of {options.repeats}"
        )
        common = {"batch_packs": options.batch_packs, "workers": options.workers}
        rows = {
            "ours": our_rates(data, folder, repeats=options.repeats, **common),
            "open_dataset": interface_rates(data, folder, repeats=options.repeats, **common),
            "streaming": streaming_rates(data, folder, repeats=options.repeats, **common),
            "litdata": litdata_rates(folder, tokens=tokens, block=tokens // packs, repeats=options.repeats, **common),
        }
        ours = statistics.median(rows["ours"] or [])
        for name, rates in rows.items():
            if rates:
                median = statistics.median(rates)
                spread = f"{min(rates) / 1e6:.1f} … {max(rates) / 1e6:.1f}"
                print(f"{name:12} {median / 1e6:6.1f} M tokens/s ({spread}), ours is {ours / median:.2f} of it")
        for name, resume in (("start", False), ("resume", True)):
            seconds = first_batch_seconds(data, folder, resume=resume, **common)
            print(f"first batch on {name}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
