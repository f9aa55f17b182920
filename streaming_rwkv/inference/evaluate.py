"""Loss of any checkpoint on a data set: `streaming-rwkv evaluate CHECKPOINT DATA_SET`; scores with `--tasks`.

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
from streaming_rwkv.console import print_rich
from streaming_rwkv.data.batch import Batch
from streaming_rwkv.data.loader import LoaderOptions, PackDataset, data_spec, evaluation_batches
from streaming_rwkv.data.setting_names import SettingNames
from streaming_rwkv.data.shard_set import ShardSet, check_cache, check_shards, open_shard_set
from streaming_rwkv.filesystem import make_folder
from streaming_rwkv.inference.loading import find_device, find_tokenizer
from streaming_rwkv.location import checked_local
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.weights import read_model
from streaming_rwkv.plotting.tables import validation_rows
from streaming_rwkv.shards import Split
from streaming_rwkv.tokenizer import load_tokenizer
from streaming_rwkv.train.callbacks.validation import groups_of, validation_metrics
from streaming_rwkv.train.checkpoints.restore import local_checkpoint
from streaming_rwkv.train.composer_model import LossByStream, RWKV7ForTraining
from streaming_rwkv.train.position import position_metrics

TIMEOUT_SECONDS = 120.0
DOWNLOAD_ATTEMPTS = 3
FETCH_AHEAD = 64  # packs
_ARGUMENTS = SettingNames(path="data", cache="--cache")  # it has no loader processes


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
    """Return loss, perplexity and bits per byte: of all packs, by source, bucket and stream, and loss by position.

    Args:
        model: on any device; on a GPU matrix products are done in bf16, as in training.
        packs_per_stream: evaluate only this number of packs of each stream, from its beginning.
        progress: show a progress bar on standard error.
    Returns:
        validation/{loss,perplexity,bits_per_byte}/{all,source/…,bucket/…,stream/…}, and by powers of two of the
        position in the document validation/{loss,targets}_by_position/…, as a run logs them.
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
            fetch_ahead=FETCH_AHEAD,
            download_attempts=DOWNLOAD_ATTEMPTS,
            timeout_seconds=TIMEOUT_SECONDS,
            names=_ARGUMENTS,
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
    return validation_metrics(groups_of(records), sums.totals) | position_metrics(sums.totals)


def loss_table(metrics: Mapping[str, float], *, title: str) -> Table:
    """Return a table with one row for each group of streams."""
    heading, *rows = validation_rows(metrics, title=title)
    table = Table(heading[0], *(Column(name, justify="right") for name in heading[1:]))
    for row in rows:
        table.add_row(*row)
    return table


def run(options: argparse.Namespace) -> int:
    """Print the metrics of a checkpoint on a data set, on tasks or on both, and return the exit status."""
    metrics = measure(options) if options.data is not None else {}
    scores = measure_tasks(options) if options.tasks is not None else {}
    if options.json:
        print(json.dumps(metrics | scores, indent=1))
        return 0
    if metrics:
        print_rich(loss_table(metrics, title=options.split))
    if scores:
        print_rich(task_table(scores))
    return 0


def task_table(scores: Mapping[str, float]) -> Table:
    """Return a table with one row for each metric of each task."""
    table = Table("task", "metric", Column("value", justify="right"))
    for name, value in scores.items():
        _, task, metric = name.split("/", 2)
        table.add_row(task, metric, f"{value:.4f}")
    return table


def measure_tasks(options: argparse.Namespace) -> dict[str, float]:
    """Return the metrics of a checkpoint on standard tasks."""
    from streaming_rwkv.inference.tasks import evaluate_tasks  # the harness is an extra, and takes seconds to import

    device = find_device(options.device)
    with local_checkpoint(options.checkpoint) as checkpoint:
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else find_tokenizer(checkpoint)
        if tokenizer is None:
            read_model(checkpoint)  # tells if it is no checkpoint at all
            raise EvaluationError(
                f"{options.checkpoint}: no tokenizer is stored with it; name one with --tokenizer: a folder, a "
                "tokenizer.json, or rwkv-world for BlinkDL's World models"
            )
        model = read_model(checkpoint).to(device)
        folder, names = options.task_folder and Path(options.task_folder), options.tasks.split(",")
        return evaluate_tasks(model, tokenizer, names, folder=folder, limit=options.limit, shots=options.shots)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return the metrics of a checkpoint on a data set, after checking that they belong together."""
    device = find_device(options.device)
    if options.cache is not None:
        check_cache(checked_local(options.cache), names=_ARGUMENTS)
        make_folder(Path(checked_local(options.cache)), what="data cache", remedy="name another with `--cache FOLDER`")
    with TemporaryDirectory(prefix="evaluate-") as temporary, local_checkpoint(options.checkpoint) as checkpoint:
        shard_set = open_shard_set(
            options.data,
            cache=Path(options.cache or temporary),
            splits=[options.split],
            timeout_seconds=TIMEOUT_SECONDS,
            fetch=True,
            names=_ARGUMENTS,
        )
        check_shards(shard_set, shard_set.manifest.select(options.split))
        own, of_data = find_tokenizer(checkpoint), shard_set.manifest.tokenizer
        if own is not None and own.sha256 != of_data.sha256:
            raise EvaluationError(
                f"{options.data}: its ids are those of the tokenizer {of_data.name!r}, the checkpoint was trained with "
                f"{own.name!r}; prepare the data with that tokenizer"
            )
        model = read_model(checkpoint).to(device)
        return evaluate(
            model,
            shard_set,
            split=options.split,
            packs_per_stream=options.packs_per_stream,
            progress=sys.stderr.isatty(),
        )
