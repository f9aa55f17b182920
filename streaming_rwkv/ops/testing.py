"""Realistic inputs for WKV-7 and a measure of error: what tests and benchmarks of kernels have in common.

Shapes: T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from streaming_rwkv.ops.reference import state_dtype, wkv7_reference

Decays = Literal["whole range", "all fastest", "all slowest"]
INPUTS = ("r", "log_decay", "k", "v", "a", "b")


class Case(NamedTuple):
    """Documents in a row, and the gradients of what comes out. Inputs (1, T, H, N), states (D, H, N, N)."""

    inputs: list[Tensor]
    initial_state: Tensor
    cu_seqlens: Tensor
    dy: Tensor
    dfinal_state: Tensor


def make_case(
    lengths: Sequence[int],
    *,
    heads: int = 2,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    decays: Decays = "whole range",
    padding: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Case:
    """Generate inputs as a model makes them.

    They are rounded to bfloat16 first, so that every implementation gets the same numbers.
    Decay logits are sampled from [-8, 8], where σ is all but 0 and 1; "all fastest" is 12, "all slowest" is -6 or less.
    The numbers are generated on `device`, and differ between kinds of device for one seed.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, sum(lengths) + padding, heads, head_size)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    match decays:
        case "whole range":
            logits = torch.rand(*shape, generator=generator, device=device) * 16 - 8
        case "all fastest":
            logits = torch.full(shape, 12.0, device=device)
        case "all slowest":
            logits = -6 - normal(*shape).abs()
    removal = normalize(normal(*shape), dim=-1)
    inputs = {
        "r": normal(*shape),
        "log_decay": -math.exp(-0.5) * torch.sigmoid(logits),
        "k": normal(*shape) * 0.5,
        "v": normal(*shape),
        "a": -removal,
        "b": removal * torch.sigmoid(normal(*shape)),
    }
    state = (len(lengths), heads, head_size, head_size)
    return Case(
        inputs=[inputs[name].bfloat16().to(dtype) for name in INPUTS],
        initial_state=normal(*state).to(state_dtype(dtype)),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device),
        dy=normal(*shape).bfloat16().to(dtype),
        dfinal_state=normal(*state).to(state_dtype(dtype)),
    )


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """Convert all numbers to another type; the states to the type of that type's states."""
    states = state_dtype(dtype)
    return Case(
        inputs=[x.to(dtype) for x in case.inputs],
        initial_state=case.initial_state.to(states),
        cu_seqlens=case.cu_seqlens,
        dy=case.dy.to(dtype),
        dfinal_state=case.dfinal_state.to(states),
    )


def run(op: Callable[..., tuple[Tensor, Tensor]], case: Case) -> dict[str, Tensor]:
    """Return y, final_state, and the gradients: dr, dlog_decay, …, dinitial_state."""
    leaves = [x.detach().requires_grad_() for x in (*case.inputs, case.initial_state)]
    y, final_state = op(*leaves[:6], initial_state=leaves[6], cu_seqlens=case.cu_seqlens)
    gradients = torch.autograd.grad((y, final_state), leaves, (case.dy, case.dfinal_state))
    names = (*(f"d{name}" for name in INPUTS), "dinitial_state")
    return {
        "y": y.detach(),
        "final_state": final_state.detach(),
        **dict(zip(names, gradients, strict=True)),
    }


def run_reference(case: Case, *, segment: int = 256) -> dict[str, Tensor]:
    """Compute the definition in float64, `segment` tokens at a time, so that few states are kept."""
    case = in_dtype(case, torch.float64)
    y = torch.zeros_like(case.dy)
    gradients = [torch.zeros_like(x) for x in case.inputs]
    final_states, dinitial_states = [], []
    for document, (start, stop) in enumerate(itertools.pairwise(case.cu_seqlens.tolist())):
        pieces = [slice(first, min(first + segment, stop)) for first in range(start, stop, segment)]
        state = case.initial_state[document : document + 1]
        before = []
        for piece in pieces:
            before.append(state)
            y[:, piece], state = wkv7_reference(*(x[:, piece] for x in case.inputs), initial_state=state)
        final_states.append(state)
        dstate = case.dfinal_state[document : document + 1]
        for piece, state in zip(reversed(pieces), reversed(before), strict=True):
            leaves = [x.detach().requires_grad_() for x in (*(x[:, piece] for x in case.inputs), state)]
            outputs = wkv7_reference(*leaves[:6], initial_state=leaves[6])
            *found, dstate = torch.autograd.grad(outputs, leaves, (case.dy[:, piece], dstate))
            for gradient, part in zip(gradients, found, strict=True):
                gradient[:, piece] = part
        dinitial_states.append(dstate)
    names = [f"d{name}" for name in INPUTS]
    return {
        "y": y,
        "final_state": torch.cat(final_states),
        **dict(zip(names, gradients, strict=True)),
        "dinitial_state": torch.cat(dinitial_states),
    }


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error ‖found - expected‖ / ‖expected‖."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item() if expected.norm() else found.norm().item()


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error of each expected tensor."""
    return {name: error(found[name], expected[name]) for name in expected}
