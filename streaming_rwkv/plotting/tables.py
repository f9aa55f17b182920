"""Tables of runs: progress, last values, and differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streaming_rwkv.plotting.runs import History, Run, bucket_order


def summary(history: History) -> list[list[str]]:
    """Return a row for each run: its progress and its last values."""
    head = ["run", "steps", "tokens", "training loss, last 2.5%", "validation loss", "bits per byte"]
    rows = [[*head, "tokens / s, median"]]
    for run in history.runs:
        loss = run.series("loss/train/total")[1]
        loss = loss[np.isfinite(loss)]
        last = [run.series(f"validation/{name}/all")[1][-1:] for name in ("loss", "bits_per_byte")]
        rate = run.series("throughput/tokens_per_second")[1]
        rows.append(
            [
                run.name,
                f"{run.last_step:,}",
                f"{run.total_tokens:,.0f}",
                f"{loss[-max(1, len(loss) // 40) :].mean():.4f}" if len(loss) else "–",
                *(f"{value[0]:.4f}" if len(value) else "–" for value in last),
                f"{np.median(rate):,.0f}" if len(rate) else "–",
            ]
        )
    return rows


def last_validation(run: Run) -> list[list[str]]:
    """Return loss, perplexity and bits per byte of each source and bucket at the run's last evaluation."""
    latest: dict[str, Any] = {}
    for row in run.rows:
        if any(name.startswith("validation/") for name in row):
            latest = row
    return validation_rows(latest, title=f"{run.name}, step {latest['step']:,}") if latest else []


def validation_rows(metrics: Mapping[str, Any], *, title: str) -> list[list[str]]:
    """Return a heading, and one row each for all packs, every source, bucket and range of positions in `metrics`."""
    prefix = "validation/loss/"
    groups = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
    shown = [name for name in groups if name.startswith(("source/", "bucket/"))]
    shown.sort(key=lambda name: (name.startswith("bucket/"), bucket_order(name[7:]) if name[0] == "b" else 0, name))
    kinds = {"loss": "nats per token", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    rows = [[title, *kinds.values()]]
    for name in ["all", *shown]:
        values = [(kind, metrics.get(f"validation/{kind}/{name}")) for kind in kinds]
        rows.append(
            [name.replace("/", " "), *("–" if value is None else _shown(kind, value) for kind, value in values)]
        )
    prefix = "validation/loss_by_position/"
    for name, loss in metrics.items():  # in their order
        if name.startswith(prefix):
            perplexity = math.exp(min(700.0, loss))
            label = f"position {name.removeprefix(prefix)}"
            rows.append([label, _shown("loss", loss), _shown("perplexity", perplexity), "–"])
    return rows


def _shown(kind: str, value: float) -> str:
    if kind != "perplexity":
        return f"{value:.4f}"
    return f"{value:#.4g}".rstrip(".") if value < 10_000 else f"{value:.0f}"  # four significant digits


COMPARED = {
    "training loss": "loss/train/total",
    "validation loss": "validation/loss/all",
    "bits per byte": "validation/bits_per_byte/all",
}


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Return the losses of each run after the tokens that all have seen, and their differences from the first run."""
    tokens = min(run.total_tokens for run in runs)
    sources = dict.fromkeys(
        name for run in runs for row in run.rows for name in row if name.startswith("validation/loss/source/")
    )
    compared = COMPARED | {f"validation loss, {name.rsplit('/', 1)[1]}": name for name in sources}
    head = [
        f"after {tokens:,.0f} tokens",
        *(run.name for run in runs),
        *(f"{run.name} − {runs[0].name}" for run in runs[1:]),
    ]
    rows = []
    for title, metric in compared.items():
        values = [_value_after(run, metric, tokens) for run in runs]
        if any(value is not None for value in values):
            apart = [None if value is None or values[0] is None else value - values[0] for value in values[1:]]
            shown_values = ["–" if value is None else f"{value:.4f}" for value in values]
            rows.append([title, *shown_values, *("–" if value is None else f"{value:+.4f}" for value in apart)])
    return [head, *rows]


def _value_after(run: Run, metric: str, tokens: float) -> float | None:
    """Return a metric after a number of tokens, between two points in proportion; of the training loss a mean."""
    at, values = run.series(metric)
    is_known = np.isfinite(values)
    at, values = at[is_known], values[is_known]
    if metric == COMPARED["training loss"]:
        values, at = values[at <= tokens], at[at <= tokens]
        return float(values[-max(1, len(values) // 40) :].mean()) if len(values) else None
    return float(np.interp(tokens, at, values)) if len(at) and at[0] <= tokens else None
