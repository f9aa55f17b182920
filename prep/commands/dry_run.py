"""The dry run of `build`: counts of documents and tokens, without writing anything."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.table import Table

from prep.commands.tables import rejected_cell
from prep.config import PrepConfig
from prep.execution.context import BuildContext
from prep.execution.engine import start
from prep.execution.observer import Observer
from prep.execution.work_folder import save_tokenizer
from prep.inputs.decontamination import read_evaluation
from prep.inputs.units import plan_units
from prep.stages.audit import AuditError, report_handler, warn_of_reference
from prep.stages.records import UnitRecord
from prep.stages.tokenization import check_not_empty, count_tokens
from streaming_rwkv.shards import bucket_bounds, bucket_name
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer


def count(config: PrepConfig, *, observer: Observer | None = None) -> list[UnitRecord]:
    """Count what `build` would read and tokenize, duplicates included, without writing anything.

    Raises:
        UserError: the same errors of the input as from `build`.
    """
    observer = observer or Observer()
    tokenizer = load_tokenizer(config.tokenizer, bos_token=config.bos_token, eos_token=config.eos_token)
    units = plan_units(config.sources, unit_bytes=config.unit_bytes)
    with tempfile.TemporaryDirectory() as folder:
        # Workers load the tokenizer from the data set's folder. This folder is temporary, and only this machine has it.
        context = BuildContext(
            config=config.model_copy(update={"out": folder, "work": None, "engine": "processes"}),
            units=units,
            vocab_size=tokenizer.vocab_size,
            loaded_tokenizer=tokenizer,
            evaluation=read_evaluation(config.decontaminate) if config.decontaminate else None,
        )
        save_tokenizer(tokenizer, context)
        try:
            records = _count(context, tokenizer, observer)
        except AuditError as error:
            warn_of_reference(error)
            records = _count(replace(context, by_reference=True), tokenizer, observer)
    check_not_empty(context, records)
    return records


def _count(context: BuildContext, tokenizer: Tokenizer, observer: Observer) -> list[UnitRecord]:
    with start(context, on_report=report_handler(observer, tokenizer)) as run:
        return count_tokens(context, run, observer)


def count_table(records: Sequence[UnitRecord], edges: Sequence[int]) -> Table:
    """Return a table of a dry run's counts by source and bucket, for both splits together, duplicates included."""
    table = Table("source", "bucket", title="dry run: duplicates are still counted, nothing was written")
    for column in ("documents", "pieces", "tokens", "rejected"):
        table.add_column(column, justify="right")
    names = [bucket_name(*bounds) for bounds in bucket_bounds(edges)]
    for source, members in itertools.groupby(records, key=lambda record: record.source):
        of_source = list(members)
        counts = sum(np.array(record.streams).reshape(-1, len(names), 3).sum(axis=0) for record in of_source)
        for name, of_bucket in zip(names, counts.tolist(), strict=True):
            if any(of_bucket):
                table.add_row(source, name, *(f"{count:,}" for count in of_bucket))
        rejected = sum((Counter(record.rejected) for record in of_source), Counter[str]())
        totals = (f"{count:,}" for count in counts.sum(axis=0).tolist())
        table.add_row(source, "all", *totals, rejected_cell(dict(sorted(rejected.items()))))
        table.add_section()
    return table
