"""The kernels under test: each takes a `Case` and gives outputs and gradients by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from streaming_rwkv.ops import cuda, cuda_chunked, wkv7
from streaming_rwkv.ops.testing import Case, run
from tests.ops.emulation import Emulation, run_cuda_on_cpu

RunCase = Callable[[Case], dict[str, Tensor]]


@pytest.fixture(scope="session")
def cuda_on_cpu() -> Callable[..., RunCase]:
    """cuda_on_cpu(seed=…, left_out=…) → the sequential kernel under test."""

    def build(**options: Any) -> RunCase:
        return lambda case: run_cuda_on_cpu(case, cuda, Emulation(**options))

    return build


@pytest.fixture(scope="session")
def chunked_on_cpu() -> Callable[..., RunCase]:
    """chunked_on_cpu(shape=…, emulation=…) → the chunked kernels under test."""

    def build(
        *, shape: cuda_chunked.Shape = cuda_chunked.WIDE, emulation: Emulation | None = None, **options: Any
    ) -> RunCase:
        launch = emulation or Emulation(**options)
        return lambda case: run_cuda_on_cpu(case, cuda_chunked, launch, shape=shape)

    return build


@pytest.fixture(scope="session")
def emulation() -> type[Emulation]:
    return Emulation


@pytest.fixture(params=["C++", "CUDA on the CPU"])
def kernel(request: pytest.FixtureRequest, cuda_on_cpu: Callable[..., RunCase]) -> RunCase:
    return (lambda case: run(wkv7, case)) if request.param == "C++" else cuda_on_cpu()


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
