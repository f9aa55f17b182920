"""The public op: what it refuses, what it says, and how it behaves in the hands of torch."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streaming_rwkv.ops import cpp, time_mixing, wkv7
from streaming_rwkv.ops.testing import Case, make_case, run

OP = torch.ops.streaming_rwkv


class Block(nn.Module):
    """The op between linear layers, as small as a block of a model can be."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.into = nn.Linear(32, 6 * heads * 64)
        self.out = nn.Linear(heads * 64, 32)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        r, w, k, v, a, b = self.into(x).unflatten(-1, (6, self.heads, 64)).unbind(2)
        a = nn.functional.normalize(a.float(), dim=-1).to(r.dtype)
        y, _ = wkv7(r, -0.6 * torch.sigmoid(w), k, v, -a, a * torch.sigmoid(b), cu_seqlens=cu_seqlens)
        return x + self.out(y.flatten(2))


def gradients(block: nn.Module, x: Tensor, *arguments: Tensor) -> list[Tensor]:
    y = block(x, *arguments)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(block.parameters()))]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cu_seqlens() -> Tensor:
    return torch.tensor([0, 17, 17, 48], dtype=torch.int32)


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_forward_op(dtype: torch.dtype, save: bool) -> None:
    case = make_case([17, 3], dtype=dtype)  # fills every slot of the saved states: opcheck compares unused ones too
    leaves = [x.requires_grad_(save) for x in (*case.inputs, case.initial_state)]
    torch.library.opcheck(OP.wkv7.default, (*leaves, case.cu_seqlens, save))


@pytest.mark.parametrize("with_states", [False, True])
def test_opcheck_of_the_backward_op(with_states: bool) -> None:
    case = make_case([17, 0, 3])
    saved = OP.wkv7(*case.inputs, case.initial_state, case.cu_seqlens, True)[1:]
    dfinal_state = case.dfinal_state if with_states else None
    arguments = (*case.inputs, case.cu_seqlens, *saved, case.dy, dfinal_state, with_states)
    torch.library.opcheck(OP.wkv7_backward.default, arguments)


def test_torch_compile_takes_it_in_one_graph(x: Tensor, cu_seqlens: Tensor) -> None:
    block = Block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert equal(gradients(compiled, x, cu_seqlens), gradients(block, x, cu_seqlens))
    assert equal(gradients(compiled, x), gradients(block, x))


@pytest.mark.slow
def test_torch_compile_with_inductor(x: Tensor, cu_seqlens: Tensor) -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True)
    for found, expected in zip(gradients(compiled, x, cu_seqlens), gradients(block, x, cu_seqlens), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(x: Tensor, cu_seqlens: Tensor, use_reentrant: bool) -> None:
    block = Block()
    x.requires_grad_()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
            y = checkpoint(self.block, x, cu_seqlens, use_reentrant=use_reentrant)
            assert isinstance(y, Tensor)
            return y

    expected = gradients(block, x, cu_seqlens)
    y = Checkpointed()(x, cu_seqlens)
    y.square().sum().backward()
    assert equal([y.detach(), *(p.grad for p in block.parameters() if p.grad is not None)], expected)


def test_autocast_runs_it_in_bfloat16(x: Tensor) -> None:
    block = Block()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(block, x)[1:]
    assert all(gradient.dtype == torch.float32 for gradient in found)
    for gradient, expected in zip(found, gradients(block, x)[1:], strict=True):
        assert (gradient - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
def test_fsdp2_over_two_processes_gives_one_process_gradients(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
        "--nproc-per-node=2", str(Path(__file__).with_name("fsdp_worker.py")),
    ]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("gradients equal") == 2


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    case = make_case([40])
    with torch.no_grad():
        _, _, removed, states = OP.wkv7(*case.inputs, None, case.cu_seqlens, False)
    assert removed.numel() == states.numel() == 0
    y, _ = wkv7(*case.inputs, cu_seqlens=case.cu_seqlens)
    assert y.grad_fn is None
    assert torch.equal(y, wkv7(*(x.requires_grad_() for x in case.inputs), cu_seqlens=case.cu_seqlens)[0])


def test_gradients_of_one_output_alone() -> None:
    case = make_case([20])
    zeros = run(wkv7, case._replace(dfinal_state=torch.zeros_like(case.dfinal_state)))
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    y, _ = wkv7(*leaves, initial_state=case.initial_state, cu_seqlens=case.cu_seqlens)
    found = torch.autograd.grad(y, leaves, case.dy)
    assert all(torch.equal(x, zeros[f"d{name}"]) for name, x in zip(("r", "log_decay", "k"), found[:3], strict=True))

    zeros = run(wkv7, case._replace(dy=torch.zeros_like(case.dy)))
    _, state = wkv7(*leaves, initial_state=case.initial_state, cu_seqlens=case.cu_seqlens)
    found = torch.autograd.grad(state, leaves[2:4], case.dfinal_state)
    assert all(torch.equal(x, zeros[f"d{name}"]) for name, x in zip(("k", "v"), found, strict=True))


def test_rows_are_documents_without_cu_seqlens() -> None:
    case = make_case([20, 20, 20])
    rows = [x.reshape(3, 20, 2, 64) for x in case.inputs]
    y, state = wkv7(*rows, initial_state=case.initial_state)
    flat = run(wkv7, case)
    assert torch.equal(y.reshape(1, 60, 2, 64), flat["y"])
    assert torch.equal(state, flat["final_state"])


def test_inputs_need_not_be_contiguous() -> None:
    case = make_case([20])
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs]
    assert not transposed[0].is_contiguous()
    found = run(wkv7, case._replace(inputs=transposed, dy=case.dy[..., :1].expand_as(case.dy)))
    expected = run(wkv7, case._replace(dy=case.dy[..., :1].expand_as(case.dy).contiguous()))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _in_child(connection: Any, case: Case) -> None:
    connection.send(wkv7(*case.inputs, cu_seqlens=case.cu_seqlens)[0].numpy())


def test_a_forked_process_runs_it_after_its_parent_did() -> None:
    case = make_case([200, 300])
    expected, _ = wkv7(*case.inputs, cu_seqlens=case.cu_seqlens)  # on two threads
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_in_child, args=(theirs, case))
    process.start()
    try:
        assert ours.poll(timeout=60)
        assert torch.equal(torch.from_numpy(ours.recv()), expected)
    finally:
        process.kill()
        process.join()


@pytest.fixture
def announcements(caplog: pytest.LogCaptureFixture) -> list[str]:
    time_mixing._announce.cache_clear()
    caplog.set_level(logging.INFO, logger=time_mixing.__name__)
    return caplog.messages


def test_the_choice_is_logged_once(announcements: list[str], caplog: pytest.LogCaptureFixture) -> None:
    for dtype, head_size in itertools.product([torch.float32, torch.float64], [64, 16]):
        case = make_case([3], dtype=dtype, head_size=head_size)
        for _ in range(2):
            wkv7(*case.inputs)
    assert caplog.messages == [
        "wkv7 for torch.float32 on cpu, head size 64: the C++ kernel",
        "wkv7 for torch.float32 on cpu, head size 16: the step-by-step PyTorch reference",
        "wkv7 for torch.float64 on cpu, head size 64: the step-by-step PyTorch reference",
        "wkv7 for torch.float64 on cpu, head size 16: the step-by-step PyTorch reference",
    ]


def test_without_a_compiler_it_says_so_and_does_not_fall_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpp, "library", cpp.library.__wrapped__)
    with pytest.raises(ValueError, match="apt-get install g"):
        wkv7(*make_case([3]).inputs)


def test_a_device_without_a_kernel() -> None:
    x = torch.zeros(1, 3, 2, 64, device="meta")
    y, state = wkv7(x, x, x, x, x, x)  # shapes alone
    assert (y.shape, state.shape) == ((1, 3, 2, 64), (1, 2, 64, 64))
    with pytest.raises(ValueError, match="no kernel for inputs on meta"):
        time_mixing._kernel(x)


zeros = functools.partial(torch.zeros, 2, 5, 2, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": torch.zeros(5, 2, 64)}, r"r has shape \(5, 2, 64\), expected \(B, T, H, N\)"),
        ({"k": torch.zeros(2, 4, 2, 64)}, r"k is \(2, 4, 2, 64\) .*, r is \(2, 5, 2, 64\)"),
        ({"b": zeros(dtype=torch.bfloat16)}, r"b is .* torch.bfloat16 on cpu, .* one shape, dtype and device"),
        ({"v": zeros(device="meta")}, r"v is .* on meta, r is .* on cpu"),
        (dict.fromkeys(time_mixing.INPUTS, zeros(dtype=torch.float16)), r"inputs are torch.float16, expected one of"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, r"2 rows with cu_seqlens; .* B must be 1"),
        (
            {"cu_seqlens": torch.tensor([0, 5])},
            r"cu_seqlens is \(2,\) torch.int64, expected \(num_documents \+ 1,\) int32",
        ),
        ({"initial_state": torch.zeros(1, 2, 64, 64)}, r"initial_state is \(1, 2, .*, expected \(2, 2, 64, 64\)"),
        ({"initial_state": torch.zeros(2, 2, 64, 64).double()}, r"initial_state is .* torch.float64 .* torch.float32"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    arguments: dict[str, Any] = {**dict.fromkeys(time_mixing.INPUTS, zeros()), **change}
    with pytest.raises(ValueError, match=message):
        wkv7(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bounds", [[1, 5], [0, 6], [0, 4, 3]])
def test_bounds_that_do_not_rise_from_zero(bounds: list[int], dtype: torch.dtype) -> None:
    x = torch.zeros(1, 5, 1, 64, dtype=dtype)
    with pytest.raises(ValueError, match=r"cu_seqlens is \[.*\], expected to rise from 0 to 5 or less"):
        wkv7(x, x, x, x, x, x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_a_copy_of_a_module_with_the_op_works(x: Tensor) -> None:
    assert torch.equal(copy.deepcopy(Block())(x), Block()(x))
