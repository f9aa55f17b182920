"""Initialization of the weights, as in the reference trainer.

Each parameter has its own random generator, seeded by the run's seed and the parameter's name, so its values depend
neither on the other parameters nor on the number of processes.

Source: RWKV-LM/RWKV-v7/train_temp, `RWKV_Tmix_x070.__init__` and `generate_init_weight`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.rwkv7 import RWKV7

# Exponents of x_*: 1 − (n/C)^(exponent · r10)
_MIX_EXPONENTS = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}


def initialize(model: RWKV7, *, seed: int) -> None:
    """Initialize every parameter in place. The model must be on the CPU and not sharded yet.

    The same seed gives the same bits for any number of processes and threads.

        model = RWKV7(RWKV7Config(vocab_size=65536, hidden_size=768, num_layers=12))
        initialize(model, seed=17)
    """

    @torch.no_grad()
    def fill(named_parameter: tuple[str, nn.Parameter]) -> None:
        name, parameter = named_parameter
        # In float32 for any dtype of the model, so that a float64 model has the same initial values.
        parameter.copy_(initial_value(name, parameter.shape, config=model.config, seed=seed))

    # Largest first: the head takes longest.
    largest_first = sorted(model.named_parameters(), key=lambda named: -named[1].numel())
    with _one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, largest_first))


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Limit every operation to one thread until the block ends; yield the number of threads before.

    LAPACK's QR rounds differently for different thread counts, which differ between one and several processes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def initial_value(name: str, shape: torch.Size, *, config: RWKV7Config, seed: int) -> Tensor:
    """Return the initial float32 value of the parameter `name`, e.g. "blocks.3.att.w0"."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    width, head_size, layers = config.hidden_size, config.head_size, config.num_layers
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
    from_one = 1 - layer / layers  # 1 in the first layer, towards 0 in the last
    to_one = layer / max(1, layers - 1)  # 0 in the first, 1 in the last

    def orthogonal(gain: float) -> Tensor:
        return nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=generator)

    def vector(values: Tensor) -> Tensor:
        return values.float().expand(width).reshape(shape)

    channel = torch.arange(width, dtype=torch.float64)
    linear = channel / max(1, width - 1) - 0.5
    ramp = (channel % head_size - (head_size - 1) / 2) / max(0.5, (head_size - 1) / 2)
    zigzag = ramp * ramp.abs()

    match name.removeprefix(f"blocks.{layer}."):
        case "emb.weight":
            return torch.empty(shape).uniform_(-1e-4, 1e-4, generator=generator)
        case "head.weight":
            return orthogonal(0.5 * math.sqrt(max(1.0, config.vocab_size / width)))
        case "att.receptance.weight" | "att.value.weight" | "ffn.key.weight":
            return orthogonal(1.0)
        case "att.key.weight":
            return orthogonal(0.1)
        case "att.output.weight" | "ffn.value.weight" | "att.w1" | "att.a1" | "att.v1" | "att.g1":
            return torch.zeros(shape)
        case "att.w2" | "att.a2" | "att.v2" | "att.g2":
            return orthogonal(0.1 * math.sqrt(max(1.0, shape[0] / shape[1])))
        case "ffn.x_k":
            return vector(1 - (channel / width) ** (from_one**4))
        case "att.w0":
            return vector(-6 + 6 * (channel / max(1, width - 1)) ** (1 + to_one**0.3) + 0.5 + 2.5 * zigzag)
        case "att.a0":
            return vector(-0.19 + 0.3 * zigzag + 0.4 * linear)
        case "att.v0":
            return vector(0.73 - 0.4 * linear)
        case "att.k_k":
            return vector(0.71 - 0.1 * linear)
        case "att.k_a":
            return vector(torch.tensor(1.02))
        case "att.r_k":
            return vector(torch.tensor(-0.04))
        case "att.ln_x.weight":
            return vector(torch.tensor(((1 + layer) / layers) ** 0.7))
        case "ln0.weight" | "ln1.weight" | "ln2.weight" | "ln_out.weight":
            return torch.ones(shape)
        case "ln0.bias" | "ln1.bias" | "ln2.bias" | "ln_out.bias" | "att.ln_x.bias":
            return torch.zeros(shape)
        case other if other.startswith("att.x_"):
            return vector(1 - (channel / width) ** (_MIX_EXPONENTS[other.removeprefix("att.")] * from_one))
        case _:
            raise AssertionError(f"no initial value is defined for parameter {name}")
