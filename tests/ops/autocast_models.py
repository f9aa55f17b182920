"""Small models in bfloat16 autocast with one or another WKV-7 kernel, against the same models in float32."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.ops import cuda, cuda_chunked, time_mixing
from streaming_rwkv.ops.cuda_chunked import WIDE
from tests.ops.emulation import Emulation


class OnCpu(NamedTuple):
    """A CUDA kernel's module as time_mixing sees it, launched on the CPU."""

    module: ModuleType
    options: dict[str, Any]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.module.forward(*arguments, **options, **self.options)

    def backward(self, *arguments: Any, **options: Any) -> Any:
        return self.module.backward(*arguments, **options, **self.options)


def random_model(generator: torch.Generator) -> RWKV7:
    model = RWKV7(RWKV7Config(vocab_size=97, hidden_size=64, num_layers=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(".weight") and parameter.ndim == 1:  # norms
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5 if parameter.ndim == 2 else 0.5 * noise)
    return model


class Distances(NamedTuple):
    """Of a model in bfloat16 autocast from the same model in float32."""

    losses: float  # root mean square over the tokens' losses
    gradients: float  # of all gradients together, relative to their size


SEQUENTIAL = OnCpu(cuda, {"launch": Emulation()})
CHUNKED = OnCpu(cuda_chunked, {"launch": Emulation(), "shape": WIDE})


def distances_from_float32(seed: int, kernels: Mapping[str, Any]) -> dict[str, Distances]:
    """Distances by kernel, of a model and a pack made from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    model = random_model(generator)
    tokens, targets = torch.randint(97, (2, 1, 120), generator=generator)
    cu_seqlens = torch.tensor([0, 17, 120], dtype=torch.int32)

    def losses_and_gradients() -> list[Tensor]:
        nll = model(tokens, cu_seqlens=cu_seqlens, targets=targets).float()
        return [nll.detach(), *torch.autograd.grad(nll.mean(), list(model.parameters()), materialize_grads=True)]

    with pytest.MonkeyPatch.context() as patch:
        expected = losses_and_gradients()
        distances = {}
        for name, kernel in kernels.items():
            patch.setattr(time_mixing, "_kernel", lambda _, kernel=kernel: kernel)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = losses_and_gradients()
            losses, *gradients = (x - y for x, y in zip(found, expected, strict=True))
            difference, size = (torch.stack([x.norm() for x in xs]).norm() for xs in (gradients, expected[1:]))
            distances[name] = Distances(float(losses.square().mean().sqrt()), float(difference / size))
    return distances
