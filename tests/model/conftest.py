"""Models to compare implementations with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.model.state import model_state
from streaming_rwkv.model.weights import write_huggingface, write_pth


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


@dataclass(frozen=True, kw_only=True)
class Oracles:
    """A model of ours, and what others made of its files."""

    model: RWKV7
    tokens: list[int]
    logits: dict[str, Tensor]  # (T, V) by `rwkv` and `rwkv7_hf` from the .pth, by `huggingface` from the folder
    converted: Path  # a Hugging Face folder that rwkv7_hf converted from the .pth


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    folder = tmp_path_factory.mktemp("oracles")
    model, tokens = build(decay_rank=16), [5, 96, 0, 0, 31, 7, 8, 42, 1, 64, 13]
    write_pth(model_state(model), folder / "model.pth", dtype=torch.float32)
    write_huggingface(model_state(model), folder / "huggingface", dtype=torch.float32)
    command = [sys.executable, str(Path(__file__).with_name("oracles.py")), str(folder), *map(str, tokens)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    logits = {name: torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("rwkv", "rwkv7_hf", "huggingface")}
    return Oracles(model=model, tokens=tokens, logits=logits, converted=folder / "converted")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
