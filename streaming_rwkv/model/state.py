"""The state of a model, its weights by name: the shape that they have, and loading into a model.

Names are the model's own, which are BlinkDL's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.config import ConfigError, validate
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.marked_files import CheckpointError
from streaming_rwkv.model.rwkv7 import RWKV7

State = dict[str, Tensor]
UNUSED = re.compile(r"blocks\.0\.att\.v[012]")  # layer 0 has no value residual


def expected_shapes(config: RWKV7Config) -> dict[str, torch.Size]:
    """Return each parameter's shape, from a model of two layers: all layers after the first have the same shapes."""
    with torch.device("meta"):
        small = RWKV7(config.model_copy(update={"num_layers": min(2, config.num_layers)}))
    shapes = {name: parameter.shape for name, parameter in small.named_parameters()}
    second = {name.split(".", 2)[2]: shape for name, shape in shapes.items() if name.startswith("blocks.1.")}
    for layer in range(2, config.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in second.items()}
    return shapes


@torch.no_grad()
def load_state(model: RWKV7, state: Mapping[str, Tensor], *, where: str) -> None:
    """Copy `state` into `model`, in place, rounding to its type. The model is on the CPU and not sharded yet.

    Raises:
        CheckpointError: a parameter is missing, unknown, of another shape, or not finite in the state or the model.
    """
    parameters = dict(model.named_parameters())
    check_fits(state, {name: parameter.shape for name, parameter in parameters.items()}, where=where)
    for name, parameter in parameters.items():
        parameter.copy_(state[name])
        _check_finite(parameter, state[name], where=f"{where}: {name}")


def check_fits(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, where: str) -> None:
    """Refuse a state that lacks one of these parameters, has another one, or one of another shape.

    Raises:
        CheckpointError: names the parameter.
    """
    unknown = sorted(name for name in state if name not in shapes and not UNUSED.fullmatch(name))
    missing = sorted(name for name in shapes if name not in state)
    if unknown or missing:
        found, own = len(_layers(state)), len(_layers(shapes))
        layers = f"; found a model of {found} layers, this one has {own}" if found != own else ""
        problem = f"has no {missing[0]}" if missing else f"has {unknown[0]}, which this model does not have"
        raise CheckpointError(f"{where}: {problem} ({len(missing)} parameters missing, {len(unknown)} unknown){layers}")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} is {tuple(state[name].shape)}, this model's is {tuple(shape)}; give the model "
                "the checkpoint's shape, or leave the shape out where it is inferred"
            )


def _is_finite(value: Tensor) -> bool:
    # The extremes are NaN if any element is; a large matrix is not copied.
    return not value.numel() or all(bool(extreme.isfinite()) for extreme in value.aminmax())


def _check_finite(value: Tensor, source: Tensor, *, where: str) -> None:
    """Refuse values that are not finite; `value` is `source` converted to another type."""
    if _is_finite(value):
        return
    kind = str(value.dtype).removeprefix("torch.")
    if _is_finite(source):
        raise CheckpointError(
            f"{where}: the largest of its values is {float(source.abs().max()):g}, too large for {kind}, whose largest "
            f"is {torch.finfo(value.dtype).max:g}; take bfloat16 or float32"
        )
    raise CheckpointError(
        f"{where}: has values that are not finite: the training that wrote it has diverged, or the file is damaged; "
        "take an older checkpoint, or copy it again"
    )


def converted_to(name: str, value: Tensor, dtype: torch.dtype, *, where: str) -> Tensor:
    """Return a tensor on the CPU in another type. Raises `CheckpointError` if a value is not finite there."""
    converted = value.detach().to("cpu", dtype)
    _check_finite(converted, value, where=f"{where}: {name}")
    return converted


def model_state(model: RWKV7) -> State:
    """Return the state of a model that is not sharded; the tensors are its parameters, not copies."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def infer_config(state: Mapping[str, Tensor], *, where: str) -> RWKV7Config:
    """Return the shape of the model with these weights: released RWKV-7 models follow several rank formulas.

    Raises:
        CheckpointError: not an RWKV-7 model.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state:
            raise CheckpointError(f"{where}: not an RWKV-7 model, it has no {name}; found {some_names(state)}")
        if state[name].ndim != dimensions:
            raise CheckpointError(f"{where}: {name} is {tuple(state[name].shape)}, expected {dimensions} dimensions")
        return state[name].shape

    vocab_size, hidden_size = shape("emb.weight", 2)
    layers = _layers(state)
    if layers != list(range(len(layers))):
        missing = next(number for number, layer in enumerate([*layers, -1]) if layer != number)
        raise CheckpointError(
            f"{where}: has weights of {len(layers)} layers up to blocks.{layers[-1]}, but none of blocks.{missing}; "
            "layers are numbered from 0 without a gap: copy it again from its source"
        )
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": len(layers),
        "head_size": shape("blocks.0.att.r_k", 2)[1],
        "ffn_size": shape("blocks.0.ffn.key.weight", 2)[0],
        "decay_rank": shape("blocks.0.att.w1", 2)[1],
        "a_rank": shape("blocks.0.att.a1", 2)[1],
        "gate_rank": shape("blocks.0.att.g1", 2)[1],
    }
    # Layer 0 needs no value residual, and early files have none for it.
    value_lora = "blocks.1.att.v1" if fields["num_layers"] > 1 else "blocks.0.att.v1"
    if fields["num_layers"] > 1 or value_lora in state:
        fields["v_rank"] = shape(value_lora, 2)[1]
    try:
        return validate(RWKV7Config, fields, where=f"{where}: not an RWKV-7 model")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _layers(state: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the layers that have weights, in ascending order."""
    found = (re.match(r"blocks\.(0|[1-9]\d{0,8})\.", name) for name in state)
    return sorted({int(match[1]) for match in found if match})


def some_names(state: Mapping[str, Any]) -> str:
    """Return some of a state's names, for an error message."""
    return ", ".join(sorted(map(str, state))[:3]) or "nothing"
