"""Inputs of WKV-7 from the projections: decay, gates, value residual and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.ops import launch
from streaming_rwkv.ops import layer_reference as reference
from streaming_rwkv.ops.layer.dispatch import WIDTH_UNIT, has_kernel
from streaming_rwkv.ops.layer.registration import as_vector, define_op, ready, sum_tiles, tiles_of, weight_gradient

Lora = tuple[Tensor, Tensor, Tensor]  # hidden (B, T, rank), up (rank, C), and the C numbers added to their product


def wkv7_inputs(
    k: Tensor,
    v: Tensor,
    v_first: Tensor | None,
    decay: Lora,
    share: Lora,
    value: Lora | None,
    k_k: Tensor,
    k_a: Tensor,
    *,
    head_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decay, key, value, removal key and replacement key of WKV-7, from the projections.

        log_decay = -exp(-1/2) σ(lora of decay)   s = σ(lora of share)
        k' = k (1 + (s - 1) k_a)                  v' = v + (v_first - v) σ(lora of value)
        κ = k k_k / max(‖k k_k‖, 1e-12), the norm of each head's

    The products of the loras are not kept for the backward pass.

    Args:
        k, v, v_first: (B, T, C) in one dtype; without `v_first` and `value` (layer 0) v' is v.
        k_k, k_a: C numbers each.
    Returns:
        log_decay, k', v', -κ, κ·s, each (B, T, H, N): what `wkv7` takes after r.
    """
    w0, a0, v0 = decay[2], share[2], None if value is None else value[2]
    hidden_and_up = [x for lora in (decay, share, value) if lora is not None for x in lora[:2]]
    kernel = has_kernel(k.shape[-1], k, v) and head_size == WIDTH_UNIT
    if kernel and torch.is_grad_enabled():
        found = _Wkv7Inputs.apply(k, v, v_first, w0, a0, k_k, k_a, v0, *hidden_and_up)
    else:
        w, a, *v_lora = (hidden @ up for hidden, up in zip(hidden_and_up[::2], hidden_and_up[1::2], strict=True))
        inputs = (w, a, k, v, v_lora[0] if v_lora else None, v_first)
        if not kernel:
            return reference.wkv7_inputs_reference(*inputs, w0, a0, k_k, k_a, v0, head_size=head_size)
        parameters = (None if x is None else as_vector(x) for x in (w0, a0, k_k, k_a, v0))
        found = torch.ops.streaming_rwkv.wkv7_inputs(*inputs, *parameters)
    heads = (k.shape[-1] // head_size, head_size)
    log_decay, k, mixed_v, removal, replacement = found
    v = v if v_first is None else mixed_v
    log_decay, k, v, removal, replacement = (x.unflatten(-1, heads) for x in (log_decay, k, v, removal, replacement))
    return log_decay, k, v, removal, replacement


class _Wkv7Inputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        v_first: Tensor | None,
        w0: Tensor,
        a0: Tensor,
        k_k: Tensor,
        k_a: Tensor,
        v0: Tensor | None,
        *hidden_and_up: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(k, v, v_first, w0, a0, k_k, k_a, v0, *hidden_and_up)
        w, a, *v_lora = (hidden @ up for hidden, up in zip(hidden_and_up[::2], hidden_and_up[1::2], strict=True))
        parameters = (None if x is None else as_vector(x) for x in (w0, a0, k_k, k_a, v0))
        found: tuple[Tensor, ...] = torch.ops.streaming_rwkv.wkv7_inputs(
            w, a, k, v, v_lora[0] if v_lora else None, v_first, *parameters
        )
        if v_first is None:
            ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        k, v, v_first, w0, a0, k_k, k_a, v0, *hidden_and_up = ctx.saved_tensors
        hidden, up = hidden_and_up[::2], hidden_and_up[1::2]
        w, a, *v_lora = (x @ y for x, y in zip(hidden, up, strict=True))
        parameters = [x for x in (w0, a0, k_k, k_a, v0) if x is not None]
        dlog_decay, dk, dv, dremoval, dreplacement = (
            torch.zeros_like(k) if gradient is None else gradient for gradient in gradients
        )
        dk, dv, dv_first, sums = torch.ops.streaming_rwkv.wkv7_inputs_backward_(
            w, a, v_lora[0] if v_lora else None, k, v, v_first, [as_vector(x) for x in parameters],
            dlog_decay, dk, None if v_first is None else dv, dremoval, dreplacement,
        )  # fmt: skip
        products = (w, a, *v_lora)  # their gradients by now
        dhidden = [product @ y.T for y, product in zip(up, products, strict=True)]
        dup = [weight_gradient(y.T, x, product).T for x, y, product in zip(hidden, up, products, strict=True)]
        pairs = [x for pair in zip(dhidden, dup, strict=True) for x in pair]
        vectors: list[Tensor | None] = [
            total.view(x.shape).to(x.dtype) for total, x in zip(sums.unbind(0), parameters, strict=True)
        ]
        if v_first is None:
            return dk, None, None, *vectors, None, *pairs
        return dk, dv, dv_first, *vectors, *pairs


def _wkv7_inputs_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, v_first = inputs[2], inputs[5]
    log_decay, k_out, removal, replacement = (k.new_empty(k.shape) for _ in range(4))
    return log_decay, k_out, k.new_empty(0 if v_first is None else k.shape), removal, replacement


_WKV7_INPUTS = (
    "Tensor w, Tensor a, Tensor k, Tensor v, Tensor? v_lora, Tensor? v_first, Tensor w0, Tensor a0, Tensor k_k, "
    "Tensor k_a, Tensor? v0"
)


@define_op(f"wkv7_inputs({_WKV7_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _wkv7_inputs_fake)
def _wkv7_inputs_op(*inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log_decay, k', v' (empty without v_first), -κ, κ·share, all (B, T, C)."""
    k, v_first = inputs[2], inputs[5]
    assert k is not None
    found = _wkv7_inputs_fake(*inputs)
    tokens, width = k.shape[0] * k.shape[1], k.shape[2]
    tile, blocks = tiles_of(tokens)
    written = [None if v_first is None and index == 2 else x for index, x in enumerate(found)]
    launch.launcher(k.device)(
        launch.Kernel("wkv7_inputs_forward", (k.dtype,), width), blocks, (tokens, tile, *map(ready, inputs), *written)
    )
    return found


def _wkv7_inputs_backward_fake(
    w: Tensor, a: Tensor, v_lora: Tensor | None, k: Tensor, v: Tensor, v_first: Tensor | None,
    parameters: list[Tensor], *gradients: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dk, dv, dv_first = (k.new_empty(shape) for shape in (k.shape, *([0 if v_first is None else k.shape] * 2)))
    return dk, dv, dv_first, k.new_empty(len(parameters), k.shape[-1], dtype=torch.float32)


@define_op(
    "wkv7_inputs_backward_(Tensor(a!) w, Tensor(b!) a, Tensor(c!)? v_lora, Tensor k, Tensor v, Tensor? v_first, "
    "Tensor[] parameters, Tensor dlog_decay, Tensor dk, Tensor? dv, Tensor dremoval, Tensor dreplacement) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _wkv7_inputs_backward_fake,
)
def _wkv7_inputs_backward_op(
    w: Tensor, a: Tensor, v_lora: Tensor | None, k: Tensor, v: Tensor, v_first: Tensor | None,
    parameters: list[Tensor], *gradients: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return gradients of k, of v and v_first (both empty without v_first), and of all parameters.

    Those of w, a and v_lora are left in their places.
    """
    assert all(x is None or x.is_contiguous() for x in (w, a, v_lora))
    dk, dv, dv_first, sums = _wkv7_inputs_backward_fake(w, a, v_lora, k, v, v_first, parameters)
    tokens, width = k.shape[0] * k.shape[1], k.shape[2]
    tile, blocks = tiles_of(tokens)
    partial = sums.new_empty(blocks, len(parameters), width)
    residual = (None, None, None) if v_first is None else (dv, v_lora, dv_first)
    launch.launcher(k.device)(
        launch.Kernel("wkv7_inputs_backward", (k.dtype,), width),
        blocks,
        (
            *(tokens, tile, w, a, ready(k), ready(v), v_lora, ready(v_first), *map(ready, parameters)),
            *([None] if v_first is None else []),  # v0
            *map(ready, gradients),
            *(w, a, dk, *residual),
            partial,
        ),
    )
    return dk, dv, dv_first, sum_tiles(partial)
