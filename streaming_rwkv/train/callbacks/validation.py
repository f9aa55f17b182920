"""Validation metrics by source, bucket and stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from composer.core import Callback, Event, State
from composer.loggers import Logger

from streaming_rwkv.shards import StreamRecord
from streaming_rwkv.train.composer_model import LossByStream
from streaming_rwkv.train.position import position_metrics


def groups_of(streams: Sequence[StreamRecord]) -> dict[str, list[int]]:
    """Return the indices of the streams that are reported together: all, by source, by bucket, and by stream."""
    groups: dict[str, list[int]] = {"all": list(range(len(streams)))}
    for i, stream in enumerate(streams):
        for name in (
            f"source/{stream.source}",
            f"bucket/{stream.bucket}",
            f"stream/{stream.source}/{stream.bucket}",
        ):
            groups.setdefault(name, []).append(i)
    return groups


def validation_metrics(groups: Mapping[str, Sequence[int]], totals: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return loss, perplexity and bits per byte of each group.

    Args:
        totals: `LossByStream.totals`.
    """
    metrics = {}
    for group, members in groups.items():
        nll, targets, text_bytes = (sum(totals[name][i] for i in members) for name in ("nll", "targets", "text_bytes"))
        if targets:
            metrics[f"validation/loss/{group}"] = nll / targets
            metrics[f"validation/perplexity/{group}"] = math.exp(min(700.0, nll / targets))
        if text_bytes:
            # Unlike the loss per token, this can be compared between tokenizers.
            metrics[f"validation/bits_per_byte/{group}"] = nll / math.log(2) / text_bytes
    return metrics


class ValidationReport(Callback):
    """Loss, perplexity and bits per byte on the validation packs: of all, by source, bucket, stream and position."""

    def __init__(self, streams: Sequence[StreamRecord]) -> None:
        self.groups = groups_of(streams)

    def eval_end(self, state: State, logger: Logger) -> None:
        metric = state.eval_metrics["eval"]["loss"]
        assert isinstance(metric, LossByStream)
        logger.log_metrics(validation_metrics(self.groups, metric.totals) | position_metrics(metric.totals))


def evaluation_interval(interval_steps: int, *, last_step: int) -> Callable[[State, Event], bool]:
    """Return Composer's condition for an evaluation: every `interval_steps` steps, and after the last step.

    The evaluation comes before the step's checkpoint, so that a run that is killed between them repeats the step.
    """

    def due(state: State, event: Event) -> bool:
        step = int(state.timestamp.batch)
        return event == Event.BATCH_END and (step % interval_steps == 0 or step == last_step)

    return due
