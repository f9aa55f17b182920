"""The network with fused ops is the network of their definitions: alone, checkpointed, compiled, carried, sharded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.ops import definitions
from tests.fork_server import ForkServer

Build = Callable[..., RWKV7]
BOUNDS = torch.tensor([0, 5, 6, 23, 32], dtype=torch.int32)  # and four rows of padding


def ids() -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(97, (2, 1, 36), generator=torch.Generator().manual_seed(3))
    targets[:, 32:] = -100
    return tokens, targets


def loss_and_gradients(model: RWKV7, *, autocast: bool = False) -> dict[str, Tensor]:
    tokens, targets = ids()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        nll = model(tokens, cu_seqlens=BOUNDS, targets=targets)
    gradients = torch.autograd.grad(nll.sum(), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {"nll": nll.detach(), **dict(zip(names, gradients, strict=True))}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: ((found[name].double() - x.double()).norm() / x.double().norm()).item() for name, x in expected.items()
    }


def test_float32_results_are_those_of_the_definitions(random_model: Build) -> None:
    expected = loss_and_gradients(random_model(dtype=torch.float64))
    found = errors(loss_and_gradients(random_model()), expected)
    # Three layers of products and a recurrence in float32; the eager network's worst gradient is as far off.
    assert max(found.values()) < 1e-5, max(found, key=lambda name: found[name])


def test_bfloat16_results_are_as_accurate_as_the_definitions(random_model: Build) -> None:
    expected = loss_and_gradients(random_model(dtype=torch.float64))
    fused = errors(loss_and_gradients(random_model(), autocast=True), expected)
    with definitions():
        eager = errors(loss_and_gradients(random_model(), autocast=True), expected)
    # Single gradients are a matter of luck: products round in 8 bits either way. Together they are not.
    assert sum(fused.values()) < sum(eager.values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's, in torch 2.11
def test_a_block_compiles(random_model: Build) -> None:
    model = random_model()
    expected = loss_and_gradients(model)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = {name.replace("_orig_mod.", ""): x for name, x in loss_and_gradients(model).items()}
    assert max(errors(found, expected).values()) < 1e-5  # rounding: autograd adds up in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_in_pieces_leaves_the_state_of_the_whole(random_model: Build, dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype)
    tokens = ids()[0].view(2, 18)
    with torch.no_grad():
        _, whole = model.step(tokens)
        _, state = model.step(tokens[:, :7])
        _, state = model.step(tokens[:, 7:8], state)
        _, state = model.step(tokens[:, 8:], state)
    for layer, expected in zip(state, whole, strict=True):
        for x, y in zip(layer, expected, strict=True):
            # Rows of products round differently: 2^-9 in bfloat16, over three layers.
            assert (x - y).norm() <= (1e-5 if dtype == torch.float32 else 3e-2) * y.norm()


def test_gradients_reach_the_initial_state_of_a_layer(random_model: Build) -> None:
    def gradient(dtype: torch.dtype) -> Tensor:
        block = random_model(dtype=dtype).blocks[1]
        g = torch.Generator().manual_seed(0)
        first, second, branch, v_first = (torch.randn(1, 5, 128, generator=g).to(dtype) for _ in range(4))
        first.requires_grad_()
        _, _, _, state = block(first, branch, v_first, None)
        x, y, _, state = block(second, branch, v_first, None, state)
        return torch.autograd.grad((x + y).square().sum() + state.ffn_shift.sum(), first)[0]

    exact = gradient(torch.float64)
    assert (gradient(torch.float32) - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.slow
def test_sharded_gradients_are_those_of_one_process(tmp_path: Path, programs: ForkServer) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
        "--nproc-per-node=2", str(Path(__file__).with_name("fused_worker.py")),
    ]  # fmt: skip
    result = programs.run(command, cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("gradients equal") == 2
