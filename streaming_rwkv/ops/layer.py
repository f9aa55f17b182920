"""The element-wise parts of an RWKV-7 layer as fused ops, around its matrix products and WKV-7.

    x ─┬─ norm_mix ── projections ── wkv7_inputs ── wkv7 ── wkv7_output ── projection ─┐ the branch, which the next
       └── + branch ─────────────────────────────────────────────────────────────────┘ norm_mix adds to x
    x ─┬─ norm_mix ── projection ── relu_squared ── projection ─┐
       └── + branch ───────────────────────────────────────────┘

Each reads and writes a number once, computes in float32 and rounds once. The backward passes compute again what is
cheap: a layer keeps no mixed inputs and no squared activations; the kernels that compute their gradients return them.
float32 and bfloat16 run in kernels, C++ on the CPU and CUDA on the GPU; float64 and widths that are no multiple of 64
run in `layer_reference`, the definition. Gradients of parameters are sums of sums over tiles of tokens, in one order.

Shapes: B rows, T tokens, C width, H heads, N head size, M mixes, D documents, V vocabulary, K tiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.ops import layer_reference as reference
from streaming_rwkv.ops.documents import check_bounds
from streaming_rwkv.ops.launch import Kernel, launcher

WIDTH_UNIT = 64  # of the kernels: a head
LEAST_TILE, MOST_TILES = 16, 1024
_definitions = False


@contextlib.contextmanager
def definitions() -> Iterator[None]:
    """Run the PyTorch definition of every op here instead of its kernel: what tests and benchmarks compare with."""
    global _definitions
    before, _definitions = _definitions, True
    try:
        yield
    finally:
        _definitions = before


def _has_kernel(width: int, *tensors: Tensor) -> bool:
    return (
        not _definitions
        and width % WIDTH_UNIT == 0
        and all(
            x.dtype in (torch.float32, torch.bfloat16) and x.device.type in ("cpu", "cuda", "meta") for x in tensors
        )
    )


def _tile(tokens: int) -> tuple[int, int]:
    """Tokens of a tile and the number of tiles: many enough for a GPU, each long enough to be worth its sums."""
    tile = max(LEAST_TILE, -(-tokens // MOST_TILES))
    return tile, -(-tokens // tile)


def _ready(x: Tensor | None) -> Tensor | None:
    """Contiguous, and aligned as vector loads want it: a view into another tensor may begin anywhere."""
    if x is None:
        return None
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _vector(x: Tensor) -> Tensor:
    """Return a parameter as kernels read it: flat, in float32."""
    return x.detach().reshape(-1).float()


def _sum_tiles(partial: Tensor) -> Tensor:
    """(K, P, C) → (P, C), in the order of the tiles."""
    tiles, *shape = partial.shape
    total = partial.new_empty(shape)
    arguments = (tiles, total.numel(), partial, total)
    launcher(partial.device)(Kernel("sum_blocks", (), 0), -(-total.numel() // WIDTH_UNIT), arguments)
    return total


def _define(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], None]:
    """Register an op of ours: its kernel for both devices, and the shapes that torch asks for without data."""
    name = f"streaming_rwkv::{schema.partition('(')[0]}"

    def register(kernel: Callable[..., Any]) -> None:
        torch.library.define(name, schema[schema.index("(") :])
        torch.library.impl(name, ("cpu", "cuda"))(kernel)
        torch.library.register_fake(name)(fake)

    return register


# ---- projections of mixed inputs -------------------------------------------------------------------------------------


def mixed_projections(
    x: Tensor,
    branch: Tensor | None,
    norm: torch.nn.LayerNorm,
    mixes: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]],
    *,
    dtype: torch.dtype,
    last: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Add a branch to the residual stream, normalize, mix each token with the one before, and project.

    With u = norm(x + branch), each mix m gives u_t + (u_{t-1} - u_t)·m, which its weights project.

    Args:
        x: (B, T, C), the residual stream. branch: (B, T, C) in `dtype`, or None.
        mixes: C numbers each, as many as `weights` has groups.
        weights: (out, C) each, grouped by the mix whose result they project.
        dtype: the type of u, the products and their results.
        last: (B, C), u of the token before each row's first, or None for zeros.
        cu_seqlens: (D + 1,) int32, rising from 0, for documents packed in one row; u_{t-1} is 0 where one starts. Rows
            past the last boundary are padding: every result is 0 there, whatever x holds. Excludes `last`.
    Returns:
        x + branch; the projections (B, T, out) in the order of `weights`; u of each row's last token, (B, C), in
        float32 or wider.
    Raises:
        ValueError: boundaries that do not rise from 0 to T or less, more than one row of packed documents.
    """
    if cu_seqlens is not None and (x.shape[0] != 1 or last is not None):
        raise ValueError(
            f"mixed_projections: {x.shape[0]} rows, last {'given' if last is not None else 'not given'}; documents "
            "are packed in one row (B must be 1) and none continues another (last must be None)"
        )
    fused = (
        _has_kernel(x.shape[-1], x)
        and dtype in (torch.float32, torch.bfloat16)
        and (x.dtype, dtype) != (torch.bfloat16, torch.float32)
        and len(mixes) in (1, 6)
    )
    if not fused:
        if cu_seqlens is not None:
            check_bounds("mixed_projections", cu_seqlens, x.shape[1])
        x, mixed, after = reference.norm_mix_reference(
            x, branch, norm.weight, norm.bias, mixes, last=last, cu_seqlens=cu_seqlens, eps=norm.eps, dtype=dtype
        )
        products = [z @ weight.T for z, group in zip(mixed, weights, strict=True) for weight in group]
        return x, products, after
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(x.device, non_blocking=True)
    groups = tuple(len(group) for group in weights)
    flat = [weight for group in weights for weight in group]
    if torch.is_grad_enabled():
        residual, after, *products = _MixedProjections.apply(
            x, branch, norm.weight, norm.bias, last, cu_seqlens, norm.eps, dtype, groups, *mixes, *flat
        )
    else:  # products under autocast, which keeps the weights it casts
        residual, _, after, mixed = _norm_mix(
            x, branch, norm.weight, norm.bias, mixes, last, cu_seqlens, norm.eps, dtype
        )
        products = [z @ weight.T for z, group in zip(mixed, weights, strict=True) for weight in group]
    return x if branch is None else residual, products, after


def _norm_mix(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Sequence[Tensor],
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    last = None if last is None else last.float()
    vectors = _vector(weight), _vector(bias), torch.stack([_vector(mix) for mix in mixes])
    result: tuple[Tensor, Tensor, Tensor, list[Tensor]] = torch.ops.streaming_rwkv.norm_mix(
        x, branch, *vectors, last, cu_seqlens, eps, dtype
    )
    return result


class _MixedProjections(torch.autograd.Function):
    """norm_mix and the products of its results, which are not kept: the gradients' kernel makes them once more."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        last: Tensor | None,
        cu_seqlens: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        groups: tuple[int, ...],
        *mixes_and_weights: Tensor,
    ) -> tuple[Tensor, ...]:
        mixes, weights = mixes_and_weights[: len(groups)], mixes_and_weights[len(groups) :]
        residual, stats, after, mixed = _norm_mix(x, branch, weight, bias, mixes, last, cu_seqlens, eps, dtype)
        owners = [index for index, count in enumerate(groups) for _ in range(count)]
        products = [mixed[owner] @ w.T for owner, w in zip(owners, weights, strict=True)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if branch is None else residual, stats, weight, bias, last, cu_seqlens, *mixes_and_weights
        )
        ctx.owners, ctx.has_branch, ctx.dtype = owners, branch is not None, dtype
        if branch is None:
            ctx.mark_non_differentiable(residual)
        return residual, after, *products

    @staticmethod
    def backward(
        ctx: Any, dresidual: Tensor | None, dafter: Tensor | None, *dproducts: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        residual, stats, weight, bias, last, cu_seqlens, *rest = ctx.saved_tensors
        mixes, weights = rest[: -len(ctx.owners)], rest[-len(ctx.owners) :]
        dmixed: list[Tensor | None] = [None] * len(mixes)
        for owner, w, dproduct in zip(ctx.owners, weights, dproducts, strict=True):
            if dproduct is None:
                continue
            rows, so_far = dproduct.flatten(0, -2), dmixed[owner]
            dmixed[owner] = rows @ w if so_far is None else so_far.addmm_(rows, w)
        shape = residual.shape
        dmixed_there = [residual.new_zeros(shape, dtype=ctx.dtype) if z is None else z.view(shape) for z in dmixed]
        dx, dbranch, dlast, gradients, mixed = torch.ops.streaming_rwkv.norm_mix_backward(
            residual,
            stats,
            _vector(weight),
            _vector(bias),
            torch.stack([_vector(mix) for mix in mixes]),
            None if last is None else last.float(),
            cu_seqlens,
            dresidual,
            dmixed_there,
            dafter,
            ctx.has_branch,
        )
        dweights = [
            None if dproduct is None else weight_gradient(w, mixed[owner], dproduct)
            for owner, w, dproduct in zip(ctx.owners, weights, dproducts, strict=True)
        ]
        dnorm_weight, dnorm_bias, *dmixes = gradients.unbind(0)
        return (
            dx,
            dbranch if ctx.has_branch else None,
            dnorm_weight.to(weight.dtype),
            dnorm_bias.to(bias.dtype),
            None if last is None else dlast.to(last.dtype),
            None,
            None,
            None,
            None,
            *(dmix.view(mix.shape).to(mix.dtype) for dmix, mix in zip(dmixes, mixes, strict=True)),
            *dweights,
        )


def weight_gradient(weight: Tensor, x: Tensor, dproduct: Tensor) -> Tensor:
    """Return the gradient of `weight` (out, in) in x @ weight.T, in its memory order: autograd copies any other."""
    rows, drows = x.flatten(0, -2), dproduct.flatten(0, -2)
    return drows.T @ rows if weight.is_contiguous() else (rows.T @ drows).T


def _norm_mix_fake(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    rows, tokens, width = x.shape
    return (
        x.new_empty(0 if branch is None else x.shape),
        x.new_empty(rows * tokens, 2, dtype=torch.float32),
        x.new_empty(rows, width, dtype=torch.float32),
        [x.new_empty(x.shape, dtype=dtype) for _ in range(mixes.shape[0])],
    )


@_define(
    "norm_mix(Tensor x, Tensor? branch, Tensor weight, Tensor bias, Tensor mixes, Tensor? last, Tensor? cu_seqlens, "
    "float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor[])",
    _norm_mix_fake,
)
def _norm_mix_op(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Add the branch, normalize, and mix each token with the one before.

    Returns x + branch (empty without a branch), mean and 1/deviation of each token, the last u of each row, the mixes.
    """
    rows, tokens, width = x.shape
    if cu_seqlens is not None:
        check_bounds("mixed_projections", cu_seqlens, tokens)
    residual, stats, after, mixed = _norm_mix_fake(x, branch, weight, bias, mixes, last, cu_seqlens, eps, dtype)
    if cu_seqlens is not None or tokens == 0:
        after.zero_()  # no row continues
    tile, blocks = _tile(rows * tokens)
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    launcher(x.device)(
        Kernel("norm_mix_forward", (x.dtype, dtype), width, mixes.shape[0]),
        blocks,
        (
            *(rows * tokens, tokens, documents, _ready(cu_seqlens), tile, eps, _ready(x)),
            _ready(None if branch is None else branch.to(dtype)),
            *map(_ready, (weight, bias, mixes, last)),
            *(residual, stats, after if cu_seqlens is None else None, *mixed),
        ),
    )
    return residual, stats, after, mixed


def _norm_mix_backward_fake(
    residual: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    dresidual: Tensor | None,
    dmixed: list[Tensor],
    dafter: Tensor | None,
    branch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    return (
        residual.new_empty(residual.shape),
        dmixed[0].new_empty(residual.shape if branch else 0),
        residual.new_empty(0 if last is None else last.shape, dtype=torch.float32),
        residual.new_empty(2 + len(dmixed), residual.shape[-1], dtype=torch.float32),
        [x.new_empty(x.shape) for x in dmixed],
    )


@_define(
    "norm_mix_backward(Tensor residual, Tensor stats, Tensor weight, Tensor bias, Tensor mixes, Tensor? last, "
    "Tensor? cu_seqlens, Tensor? dresidual, Tensor[] dmixed, Tensor? dafter, bool branch) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _norm_mix_backward_fake,
)
def _norm_mix_backward_op(
    residual: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    dresidual: Tensor | None,
    dmixed: list[Tensor],
    dafter: Tensor | None,
    branch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Return the gradients of `_norm_mix_op`, and the mixes again.

    Of x, branch and last (empty where there is none), and of weight, bias and mixes together (2 + M, C).
    """
    rows, tokens, width = residual.shape
    dx, dbranch, dlast, _, mixed = _norm_mix_backward_fake(
        residual, stats, weight, bias, mixes, last, cu_seqlens, dresidual, dmixed, dafter, branch
    )
    tile, blocks = _tile(rows * tokens)
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    partial = stats.new_empty(blocks, 2 + len(dmixed), width)
    launcher(residual.device)(
        Kernel("norm_mix_backward", (residual.dtype, dmixed[0].dtype), width, len(dmixed)),
        blocks,
        (
            *(rows * tokens, tokens, documents, _ready(cu_seqlens), tile),
            *map(_ready, (residual, stats, weight, bias, mixes, last, dresidual)),
            _ready(dafter) if cu_seqlens is None else None,
            *(dx, dbranch if branch else None, None if last is None else dlast, partial),
            *map(_ready, dmixed),
            *mixed,
        ),
    )
    return dx, dbranch, dlast, _sum_tiles(partial), mixed


# ---- between the projections and WKV-7 -------------------------------------------------------------------------------


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
    kernel = _has_kernel(k.shape[-1], k, v) and head_size == WIDTH_UNIT
    if kernel and torch.is_grad_enabled():
        found = _Wkv7Inputs.apply(k, v, v_first, w0, a0, k_k, k_a, v0, *hidden_and_up)
    else:
        w, a, *v_lora = (hidden @ up for hidden, up in zip(hidden_and_up[::2], hidden_and_up[1::2], strict=True))
        inputs = (w, a, k, v, v_lora[0] if v_lora else None, v_first)
        if not kernel:
            return reference.wkv7_inputs_reference(*inputs, w0, a0, k_k, k_a, v0, head_size=head_size)
        parameters = (None if x is None else _vector(x) for x in (w0, a0, k_k, k_a, v0))
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
        parameters = (None if x is None else _vector(x) for x in (w0, a0, k_k, k_a, v0))
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
        dw, da, dk, dv, dv_lora, dv_first, sums = torch.ops.streaming_rwkv.wkv7_inputs_backward(
            [w, a, k, v], v_lora[0] if v_lora else None, v_first, [_vector(x) for x in parameters],
            dlog_decay, dk, None if v_first is None else dv, dremoval, dreplacement,
        )  # fmt: skip
        products = (dw, da, dv_lora)[: len(up)]
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


@_define(f"wkv7_inputs({_WKV7_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _wkv7_inputs_fake)
def _wkv7_inputs_op(*inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log_decay, k', v' (empty without v_first), -κ, κ·share, all (B, T, C)."""
    k, v_first = inputs[2], inputs[5]
    assert k is not None
    found = _wkv7_inputs_fake(*inputs)
    tokens, width = k.shape[0] * k.shape[1], k.shape[2]
    tile, blocks = _tile(tokens)
    written = [None if v_first is None and index == 2 else x for index, x in enumerate(found)]
    launcher(k.device)(
        Kernel("wkv7_inputs_forward", (k.dtype,), width), blocks, (tokens, tile, *map(_ready, inputs), *written)
    )
    return found


def _wkv7_inputs_backward_fake(
    inputs: list[Tensor], v_lora: Tensor | None, v_first: Tensor | None, parameters: list[Tensor], *gradients: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    k = inputs[2]
    shapes = [k.shape, k.shape, k.shape, *([0 if v_first is None else k.shape] * 3)]
    dw, da, dk, dv, dv_lora, dv_first = (k.new_empty(shape) for shape in shapes)
    sums = k.new_empty(len(parameters), k.shape[-1], dtype=torch.float32)
    return dw, da, dk, dv, dv_lora, dv_first, sums


@_define(
    "wkv7_inputs_backward(Tensor[] inputs, Tensor? v_lora, Tensor? v_first, Tensor[] parameters, "
    "Tensor dlog_decay, Tensor dk, Tensor? dv, Tensor dremoval, Tensor dreplacement) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _wkv7_inputs_backward_fake,
)
def _wkv7_inputs_backward_op(
    inputs: list[Tensor],
    v_lora: Tensor | None,
    v_first: Tensor | None,
    parameters: list[Tensor],
    *gradients: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of w, a, k, v, v_lora, v_first (the last three empty without v_first), and of all parameters."""
    k = inputs[2]
    found = _wkv7_inputs_backward_fake(inputs, v_lora, v_first, parameters)
    tokens, width = k.shape[0] * k.shape[1], k.shape[2]
    tile, blocks = _tile(tokens)
    partial = found[-1].new_empty(blocks, len(parameters), width)
    written = [x if x.numel() or not tokens else None for x in found[:6]]
    launcher(k.device)(
        Kernel("wkv7_inputs_backward", (k.dtype,), width),
        blocks,
        (
            *(tokens, tile, *map(_ready, (*inputs, v_lora, v_first, *parameters))),
            *([None] if v_first is None else []),  # v0
            *map(_ready, gradients),
            *written,
            partial,
        ),
    )
    return *found[:6], _sum_tiles(partial)


# ---- between WKV-7 and the output projection -------------------------------------------------------------------------


def wkv7_output(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, *, eps: float
) -> Tensor:
    """(GroupNorm(y) + bonus) · gate, a head a group; the bonus of a head is (Σ r k r_k) v.

    Args:
        y, r, k, v: (B, T, H, N). gate: (B, T, C). All in one dtype.
        weight, bias: (C,), of the norm. r_k: (H, N).
    Returns:
        (B, T, C).
    """
    if not _has_kernel(gate.shape[-1], y, r, k, v, gate) or y.shape[-1] != WIDTH_UNIT:
        return reference.wkv7_output_reference(y, r, k, v, gate, weight, bias, r_k, eps=eps)
    flat = (x.flatten(2) for x in (y, r, k, v))
    parameters = (x.reshape(-1).float() for x in (weight, bias, r_k))
    out: Tensor = torch.ops.streaming_rwkv.wkv7_output(*flat, gate, *parameters, eps)
    return out


_WKV7_OUTPUT = "Tensor y, Tensor r, Tensor k, Tensor v, Tensor gate, Tensor weight, Tensor bias, Tensor r_k, float eps"


@_define(f"wkv7_output({_WKV7_OUTPUT}) -> Tensor", lambda y, *rest: y.new_empty(y.shape))
def _wkv7_output_op(y: Tensor, *rest: Any) -> Tensor:
    *inputs, eps = (y, *rest)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    tokens, width = y.shape[0] * y.shape[1], y.shape[2]
    tile, blocks = _tile(tokens)
    kernel = Kernel("wkv7_output_forward", (y.dtype,), width)
    launcher(y.device)(kernel, blocks, (tokens, tile, eps, *map(_ready, inputs), out))
    return out


def _wkv7_output_backward_fake(y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *(y.new_empty(y.shape) for _ in range(5)), y.new_empty(3, y.shape[-1], dtype=torch.float32)


@_define(
    f"wkv7_output_backward({_WKV7_OUTPUT}, Tensor dout) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _wkv7_output_backward_fake,
)
def _wkv7_output_backward_op(y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of y, r, k, v, gate, and of weight, bias and r_k together (3, C)."""
    *inputs, eps, dout = (y, *rest)
    *found, sums = _wkv7_output_backward_fake(y)
    tokens, width = y.shape[0] * y.shape[1], y.shape[2]
    tile, blocks = _tile(tokens)
    partial = sums.new_empty(blocks, 3, width)
    kernel = Kernel("wkv7_output_backward", (y.dtype,), width)
    launcher(y.device)(kernel, blocks, (tokens, tile, eps, *map(_ready, (*inputs, dout)), *found, partial))
    return *found, _sum_tiles(partial)


def _wkv7_output_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _wkv7_output_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    *found, sums = torch.ops.streaming_rwkv.wkv7_output_backward(*ctx.saved_tensors, ctx.eps, dout)
    return *found, *sums.unbind(0), None


torch.library.register_autograd(
    "streaming_rwkv::wkv7_output", _wkv7_output_backward, setup_context=_wkv7_output_context
)


# ---- ReLU² and its projection ----------------------------------------------------------------------------------------


def relu_squared_projection(x: Tensor, weight: Tensor) -> Tensor:
    """max(x, 0)² @ weight.T: x (B, T, F), weight (C, F) → (B, T, C). The squares are not kept for the backward pass."""
    if not _has_kernel(x.shape[-1], x):
        return reference.relu_squared_reference(x) @ weight.T
    if not torch.is_grad_enabled():
        squared: Tensor = torch.ops.streaming_rwkv.relu_squared(x)
        return squared @ weight.T
    product: Tensor = _ReluSquaredProjection.apply(x, weight)
    return product


class _ReluSquaredProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        squared: Tensor = torch.ops.streaming_rwkv.relu_squared(x)
        return squared @ weight.T

    @staticmethod
    def backward(ctx: Any, dproduct: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx, squared = torch.ops.streaming_rwkv.relu_squared_backward(x, dproduct @ weight)
        return dx, weight_gradient(weight, squared, dproduct)


@_define("relu_squared(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
def _relu_squared_op(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    tokens, width = x.shape[:-1].numel(), x.shape[-1]
    tile, blocks = _tile(tokens)
    launcher(x.device)(Kernel("relu_squared_forward", (x.dtype,), width), blocks, (tokens, tile, _ready(x), out))
    return out


@_define(
    "relu_squared_backward(Tensor x, Tensor dout) -> (Tensor, Tensor)",
    lambda x, dout: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
def _relu_squared_backward_op(x: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and the squares again."""
    dx, out = x.new_empty(x.shape), x.new_empty(x.shape)
    tokens, width = x.shape[:-1].numel(), x.shape[-1]
    tile, blocks = _tile(tokens)
    kernel = Kernel("relu_squared_backward", (x.dtype,), width)
    launcher(x.device)(kernel, blocks, (tokens, tile, _ready(x), _ready(dout), dx, out))
    return dx, out


# ---- the loss of a chunk of logits -----------------------------------------------------------------------------------


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
        ValueError: on the CPU, a target that is no column.
    """
    if not _has_kernel(0, logits):
        nll, found = reference.cross_entropy_reference(logits, targets, scales, gradient=gradient)
        if found is not None:
            logits.copy_(found)
        return nll
    found_nll: Tensor = torch.ops.streaming_rwkv.cross_entropy_(
        logits, targets, None if scales is None else scales.float(), gradient
    )
    return found_nll


@_define(
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
    kernel = Kernel("cross_entropy", (logits.dtype,), width)
    launcher(logits.device)(kernel, rows, (rows, int(gradient), logits, _ready(targets), _ready(scales), nll))
    return nll


# ---- weights in the type of the products -----------------------------------------------------------------------------


def cast_together(weights: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Weights in `dtype`, all in one launch, and their gradients back in one.

    Autocast casts them one by one. Where no gradient is wanted it also keeps what it has cast, so there the weights are
    returned as they are, for autocast to cast.
    """
    if not torch.is_grad_enabled() or all(weight.dtype == dtype for weight in weights) or _definitions:
        return weights
    cast: tuple[Tensor, ...] = _CastTogether.apply(dtype, *weights)
    return cast


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        cast = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(cast, list(weights))
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [(n, gradient) for n, gradient in enumerate(gradients) if gradient is not None]
        result: list[Tensor | None] = [None] * len(gradients)
        cast = [torch.empty_like(gradient, dtype=ctx.dtypes[n]) for n, gradient in there]
        if there:
            torch._foreach_copy_(cast, [gradient for _, gradient in there])
        for (n, _), x in zip(there, cast, strict=True):
            result[n] = x
        return None, *result
