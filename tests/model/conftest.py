"""Models to compare implementations with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config


def build(*, dtype: torch.dtype = torch.float32, seed: int = 0, **shape: Any) -> RWKV7:
    small = {"vocab_size": 97, "hidden_size": 128, "num_layers": 3, **shape}
    model = RWKV7(RWKV7Config.model_validate(small))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(".weight") and parameter.ndim == 1:  # norms
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 2 and not name.endswith("r_k"):  # matrices keep the size of what they multiply
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.5 * noise)
    return model.to(dtype)


@pytest.fixture(scope="session")
def random_model() -> Callable[..., RWKV7]:
    """Builds models whose every weight is random: at the initialisation most gradients are exactly 0."""
    return build
