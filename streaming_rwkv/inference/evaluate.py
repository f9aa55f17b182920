"""Loss of any checkpoint on a data set: `python -m streaming_rwkv.evaluate CHECKPOINT DATA`.

Every validation pack is evaluated once, as during training. A BlinkDL file and a run's checkpoint can be compared on
the same tokens, or in bits per byte across tokenizers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from streaming_rwkv.config import UserError
from streaming_rwkv.console import print_error, print_rich, tolerate_any_encoding
from streaming_rwkv.data.batch import Batch
from streaming_rwkv.data.loader import LoaderOptions, PackDataset, data_spec, evaluation_batches
from streaming_rwkv.data.shard_set import ShardSet, check_shards, open_shard_set
from streaming_rwkv.filesystem import make_folder
from streaming_rwkv.inference.loading import find_device, find_tokenizer
from streaming_rwkv.location import checked_local
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.weights import load_model
from streaming_rwkv.plotting.tables import validation_rows
from streaming_rwkv.shards import SPLITS, Split
from streaming_rwkv.train.callbacks.validation import groups_of, validation_metrics
from streaming_rwkv.train.checkpoints.restore import local_checkpoint
from streaming_rwkv.train.composer_model import LossByStream, RWKV7ForTraining

TIMEOUT_SECONDS = 120.0
DOWNLOAD_ATTEMPTS = 3
FETCH_AHEAD = 64  # packs


class EvaluationError(UserError):
    """A checkpoint and a data set that do not fit together."""


@torch.no_grad()
def evaluate(
    model: RWKV7,
    shard_set: ShardSet,
    *,
    split: Split = "validation",
    packs_per_stream: int | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Return loss, perplexity and bits per byte: of all packs, by source, by bucket and by stream.

    Args:
        model: on any device; on a GPU matrix products are done in bf16, as in training.
        packs_per_stream: evaluate only this number of packs of each stream, from its beginning.
        progress: show a progress bar on standard error.
    Returns:
        validation/{loss,perplexity,bits_per_byte}/{all,source/…,bucket/…,stream/…}, as a run logs them.
    Raises:
        EvaluationError: the split has no packs, or the vocabulary is larger than the model's.
        UserError: a shard cannot be read.
    """
    manifest, device = shard_set.manifest, model.emb.weight.device
    records = manifest.select(split)
    if not records:
        raise EvaluationError(f"{shard_set.location}: has no {split} packs; choose another --split")
    if manifest.tokenizer.vocab_size > model.config.vocab_size:
        raise EvaluationError(
            f"{shard_set.location}: its tokenizer has {manifest.tokenizer.vocab_size} ids, the model has "
            f"{model.config.vocab_size}; prepare the data with the model's tokenizer"
        )
    batches, count = evaluation_batches(
        [record.packs for record in records], batch_packs=1, per_stream=packs_per_stream
    )
    dataset = PackDataset(
        shard_set,
        records,
        batches=batches,
        num_batches=count,
        batch_packs=1,
        options=LoaderOptions(
            fetch_ahead=FETCH_AHEAD, download_attempts=DOWNLOAD_ATTEMPTS, timeout_seconds=TIMEOUT_SECONDS
        ),
    )
    network = RWKV7ForTraining(model, num_streams=len(records), flops_per_token=1)
    sums = LossByStream(len(records)).to(device)
    with closing(dataset):
        loader = data_spec(dataset, workers=0, timeout_seconds=TIMEOUT_SECONDS).dataloader
        packs = track(loader, "packs", total=count, console=Console(stderr=True), disable=not progress)
        for batch in packs:
            moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
            on_device = cast(Batch, moved)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                outputs = network(on_device)
            network.update_metric(on_device, outputs, sums)
    sums.compute()
    return validation_metrics(groups_of(records), sums.totals)


def loss_table(metrics: Mapping[str, float], *, title: str) -> Table:
    """Return a table with one row for each group of streams."""
    heading, *rows = validation_rows(metrics, title=title)
    table = Table(heading[0], *(Column(name, justify="right") for name in heading[1:]))
    for row in rows:
        table.add_row(*row)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m streaming_rwkv.evaluate`, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m streaming_rwkv.evaluate", description="Measure a checkpoint's loss on a data set."
    )
    parser.add_argument("checkpoint", help="a .pth, a Hugging Face folder, a training run or checkpoint, also on s3://")
    parser.add_argument("data", help="a data set that prep built: a folder, or s3://bucket/prefix")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument(
        "--packs-per-stream", type=int, metavar="N", help="evaluate only the first N packs of each stream"
    )
    parser.add_argument("--cache", help="folder for downloaded and decompressed shards (default: a temporary one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON, with the names that runs log")
    options = parser.parse_args(arguments)
    if options.packs_per_stream is not None and options.packs_per_stream < 1:
        parser.error(f"--packs-per-stream: found {options.packs_per_stream}, expected 1 or more")
    tolerate_any_encoding()
    try:
        metrics = run(options)
    except UserError as error:
        print_error(error)
        return 1
    if options.json:
        print(json.dumps(metrics, indent=1))
    else:
        print_rich(loss_table(metrics, title=options.split))
    return 0


def run(options: argparse.Namespace) -> dict[str, float]:
    """Return the metrics of a checkpoint on a data set, after checking that they belong together."""
    device = find_device(options.device)
    if options.cache is not None:
        make_folder(Path(checked_local(options.cache)), what="data cache", remedy="name another with `--cache FOLDER`")
    with TemporaryDirectory(prefix="evaluate-") as temporary, local_checkpoint(options.checkpoint) as checkpoint:
        shard_set = open_shard_set(
            options.data,
            cache=Path(options.cache or temporary),
            splits=[options.split],
            timeout_seconds=TIMEOUT_SECONDS,
            fetch=True,
        )
        check_shards(shard_set, shard_set.manifest.select(options.split))
        own, of_data = find_tokenizer(checkpoint), shard_set.manifest.tokenizer
        if own is not None and own.sha256 != of_data.sha256:
            raise EvaluationError(
                f"{options.data}: its ids are those of the tokenizer {of_data.name!r}, the checkpoint was trained with "
                f"{own.name!r}; prepare the data with that tokenizer"
            )
        model = load_model(checkpoint).to(device)
        return evaluate(
            model,
            shard_set,
            split=options.split,
            packs_per_stream=options.packs_per_stream,
            progress=sys.stderr.isatty(),
        )


if __name__ == "__main__":
    sys.exit(main())
