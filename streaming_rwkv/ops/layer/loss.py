"""Loss of a chunk of logits and its gradient, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from streaming_rwkv.ops import launch
from streaming_rwkv.ops import layer_reference as reference
from streaming_rwkv.ops.layer.dispatch import has_kernel
from streaming_rwkv.ops.layer.registration import define_op, ready


def cross_entropy_(logits: Tensor, targets: Tensor, scales: Tensor | None = None, *, gradient: bool) -> Tensor:
    """Negative log-likelihoods, leaving in `logits` their gradient with L2Wrap's, in place.

    The gradient is that of Σ scale · (nll + ½·1e-4·max(logits)²) over the rows that have a target.

    Args:
        logits: (rows, V), contiguous; overwritten if `gradient`.
        targets: (rows,) int64, -100 where a row has none: its nll and gradient are 0.
        scales: (rows,), the gradient of each nll; None for 1.
    Returns:
        (rows,) in float32, float64 for float64 logits.
    Raises:
        ValueError: targets of another shape, type or device, or, on the CPU, one that is no column.
    """
    rows = logits.shape[:1]
    if targets.dtype != torch.int64 or targets.shape != rows or targets.device != logits.device:
        raise ValueError(
            f"cross_entropy_: targets are {tuple(targets.shape)} {targets.dtype} on {targets.device}, expected "
            f"{tuple(rows)} torch.int64 on {logits.device}"
        )
    if not has_kernel(0, logits):
        nll, found = reference.cross_entropy_reference(logits, targets, scales, gradient=gradient)
        if found is not None:
            logits.copy_(found)
        return nll
    found_nll: Tensor = torch.ops.streaming_rwkv.cross_entropy_(
        logits, targets, None if scales is None else scales.float(), gradient
    )
    return found_nll


@define_op(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor? scales, bool gradient) -> Tensor",
    lambda logits, *rest: logits.new_empty(logits.shape[0], dtype=torch.float32),
)
def _cross_entropy_op(logits: Tensor, targets: Tensor, scales: Tensor | None, gradient: bool) -> Tensor:
    assert logits.is_contiguous()
    rows, width = logits.shape
    if targets.device.type == "cpu":
        wrong = (targets != reference.IGNORED) & ((targets < 0) | (targets >= width))
        if wrong.any():
            raise ValueError(
                f"cross_entropy_: target {int(targets[wrong][0])}, expected 0 to {width - 1}, or {reference.IGNORED} "
                "for none"
            )
    nll = logits.new_empty(rows, dtype=torch.float32)
    kernel = launch.Kernel("cross_entropy", (logits.dtype,), width)
    launch.launcher(logits.device)(kernel, rows, (rows, int(gradient), logits, ready(targets), ready(scales), nll))
    return nll
