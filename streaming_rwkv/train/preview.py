"""What a run will do, before it does it: the mixture table."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from streaming_rwkv.data.mixture import Plan


def show(what: Table | str) -> None:
    Console(highlight=False, soft_wrap=isinstance(what, str)).print(what, markup=False)


def mixture_table(plan: Plan, *, max_repeats: float) -> Table:
    """Each stream's share of the tokens in each stage, asked for and effective, and how often its packs are seen."""
    drawn = plan.expected_targets()
    packs = np.array([stream.packs for stream in plan.streams])
    repeats = plan.end / packs
    table = Table(title="Mixture: shares of tokens, requested → effective", title_justify="left")
    table.add_column("source")
    table.add_column("bucket", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("packs", justify="right")
    for i, stage in enumerate(plan.stages):
        table.add_column(f"stage {i} ({stage.steps} steps)", justify="right")
    table.add_column("seen", justify="right")
    for s, stream in enumerate(plan.streams):
        shares = [
            f"{stage.requested[s]:.2%} → {drawn[i, s] / drawn[i].sum():.2%}" if stage.requested[s] else "–"
            for i, stage in enumerate(plan.stages)
        ]
        seen = f"{repeats[s]:.2f}×" + (" !" if repeats[s] > max_repeats else "")
        table.add_row(stream.source, stream.bucket, f"{stream.targets:,}", f"{stream.packs:,}", *shares, seen)
    too_often = [
        f"{s.source}/{s.bucket}" for s, times in zip(plan.streams, repeats, strict=True) if times > max_repeats
    ]
    if too_often:
        table.caption = (
            f"! seen more than data.max_repeats = {max_repeats:g} times: {', '.join(too_often)}; "
            "lower their share, or train on fewer tokens"
        )
    return table
