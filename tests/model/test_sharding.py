"""The network under FSDP2, in two processes over gloo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.state import model_state
from streaming_rwkv.model.weights import write_pth
from tests.fork_server import ForkServer


def batch(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    tokens, targets = torch.randint(97, (2, 1, 12), generator=generator)
    return {"tokens": tokens, "targets": targets, "cu_seqlens": torch.tensor([0, 5 + rank, 12], dtype=torch.int32)}


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., RWKV7], programs: ForkServer
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    write_pth(model_state(random_model()), folder / "model.pth", dtype=torch.float32)
    for rank in (0, 1):
        torch.save(batch(rank), folder / f"batch{rank}.pt")
    worker = Path(__file__).with_name("sharded_worker.py")
    processes = [programs.popen([sys.executable, worker, folder, str(rank)]) for rank in (0, 1)]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    return [torch.load(folder / f"result{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
def test_a_sharded_model_has_the_gradients_of_a_whole_one(
    results: list[dict[str, Any]], random_model: Callable[..., RWKV7]
) -> None:
    model = random_model()
    total = torch.tensor(0.0)
    for rank in (0, 1):
        nll = model(**batch(rank))
        torch.testing.assert_close(results[rank]["float32"]["nll"], nll, rtol=0, atol=1e-5)
        total = total + nll.sum()
    (total / 2 * results[0]["gradient_scale"]).backward()
    largest = max(parameter.grad.abs().max().item() for parameter in model.parameters() if parameter.grad is not None)
    for name, parameter in model.named_parameters():
        for rank in (0, 1):
            gradient = results[rank]["float32"]["gradients"][name]
            torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-5 * largest, msg=name)


@pytest.mark.slow
def test_a_sharded_model_steps(results: list[dict[str, Any]], random_model: Callable[..., RWKV7]) -> None:
    with torch.no_grad():
        logits, _ = random_model().step(torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(results[0]["float32"]["logits"], logits, rtol=0, atol=1e-5)
    assert torch.equal(results[0]["float32"]["logits"], results[1]["float32"]["logits"])


@pytest.mark.slow
def test_bfloat16_shards_stay_near_float32(results: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        exact, narrow = results[rank]["float32"], results[rank]["bfloat16"]
        assert (exact["nll"] - narrow["nll"]).abs().max() < 0.3
        assert all(gradient.isfinite().all() for gradient in narrow["gradients"].values())
