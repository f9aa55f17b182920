"""The layer's fused ops: each kernel against its definition in float64, and in the hands of torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from streaming_rwkv.ops import cast_together, cross_entropy_, definitions, launch
from streaming_rwkv.ops.testing import errors
from tests.ops import layer_kernels as kernels
from tests.ops.layer_kernels import OpCase, run, run_cross_entropy

OP = torch.ops.streaming_rwkv
# 128 channels are one warp of a CUDA block; 320 are 80 groups of four in 96 threads.
CASES: dict[str, Callable[[], OpCase]] = {
    "six mixes of a pack": lambda: kernels.norm_mix_case([5, 1, 0, 17, 30], padding=3),
    "one mix of a pack": lambda: kernels.norm_mix_case([5, 1, 0, 17, 30], mixes=1, padding=3),
    "six mixes of rows": lambda: kernels.norm_mix_case([21], rows=3),
    "six mixes without a branch": lambda: kernels.norm_mix_case([40, 5], branch=False),
    "six mixes of 320 channels": lambda: kernels.norm_mix_case([40], width=320),
    "inputs of wkv7": lambda: kernels.wkv7_inputs_case(37),
    "inputs of wkv7 in layer 0": lambda: kernels.wkv7_inputs_case(37, residual=False),
    "inputs of wkv7, 320 channels": lambda: kernels.wkv7_inputs_case(18, width=320),
    "output of wkv7": lambda: kernels.wkv7_output_case(37),
    "output of wkv7, 320 channels": lambda: kernels.wkv7_output_case(18, width=320),
    "ReLU² and its projection": lambda: kernels.relu_squared_case(37),
}
IN_A_PACK = ("six mixes of a pack", "one mix of a pack")


@pytest.fixture(params=["C++", "CUDA on the CPU"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every op runs in this kernel."""
    if request.param == "CUDA on the CPU":
        on_cpu = kernels.cuda_on_cpu()
        monkeypatch.setattr(launch, "launcher", lambda _: on_cpu)
    return str(request.param)


@functools.cache
def exact(name: str) -> dict[str, Tensor]:
    return run(CASES[name](), torch.float64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("device")
def test_float32_equals_the_definition(name: str) -> None:
    case = CASES[name]()
    for output, error in errors(run(case, torch.float32), exact(name)).items():
        # Sums of some hundred roundings of 2^-24 each; gradients of parameters are sums of such sums.
        assert error <= (1e-6 if output in case.outputs else 1e-5), output


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("device")
def test_bfloat16_is_no_worse_than_the_definition_in_bfloat16(name: str, residual: torch.dtype) -> None:
    found = errors(run(CASES[name](), torch.bfloat16, residual=residual), exact(name))
    with definitions():
        eager = errors(run(CASES[name](), torch.bfloat16, residual=residual), exact(name))
    # Where both round once, their errors differ by what float32 loses.
    assert {output: (error, eager[output]) for output, error in found.items() if error > 1.001 * eager[output]} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [97, 128, 1030])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.usefixtures("device")
def test_loss_and_gradient_of_logits_equal_the_definition(scales: bool, width: int, dtype: torch.dtype) -> None:
    case = kernels.cross_entropy_case(12, width, scales=scales)
    nll, gradient = run_cross_entropy(case, dtype)
    expected_nll, expected = run_cross_entropy(case, torch.float64)
    assert nll.dtype == torch.float32
    assert kernels_error(nll, expected_nll) <= 1e-6
    # bfloat16 rounds once: 2^-9 at most, 1.7e-3 in the mean.
    assert kernels_error(gradient, expected) <= (1e-6 if dtype == torch.float32 else 2e-3)
    assert (gradient[1::5] == 0).all()
    assert (nll[1::5] == 0).all()
    only_loss, untouched = run_cross_entropy(case, dtype, gradient=False)
    assert torch.equal(only_loss, nll)
    assert torch.equal(untouched, case["logits"].to(dtype))


def kernels_error(found: Tensor, expected: Tensor) -> float:
    return errors({"": found}, {"": expected})[""]


@pytest.mark.usefixtures("device")
def test_the_first_of_equal_largest_logits_is_wrapped() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0] * 257 + [0.0, 0.0]])  # a width that is compiled already
    wrapped = logits.clone()
    cross_entropy_(wrapped, torch.tensor([0]), gradient=True)
    plain = torch.softmax(logits, -1)
    plain[0, 0] -= 1
    assert (wrapped - plain).abs().argmax() == 1
    assert (wrapped - plain)[0, 1].item() == pytest.approx(5e-4, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("device")
def test_a_masked_logit_has_no_share_and_no_gradient(dtype: torch.dtype) -> None:
    logits = torch.linspace(-3, 3, 1030).expand(2, -1).to(dtype).contiguous()
    logits[:, [5, 1028]] = -torch.inf
    expected = torch.softmax(logits.double(), -1)
    expected_nll = -expected[:, 9].log()
    nll = cross_entropy_(logits, torch.tensor([9, 9]), gradient=True)
    assert kernels_error(nll, expected_nll) <= 1e-6
    assert (logits[:, [5, 1028]] == 0).all()
    rest = [c for c in range(1028) if c not in (5, 9)]
    assert kernels_error(logits[:, rest], expected[:, rest]) <= (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.usefixtures("device")
def test_a_logit_that_is_not_a_number_shows_in_the_loss() -> None:
    logits = torch.zeros(2, 1030)
    logits[1, 77] = float("nan")
    nll = cross_entropy_(logits, torch.tensor([3, 3]), gradient=True)
    assert nll.isnan().tolist() == [False, True]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("device")
def test_the_same_bits_every_time_for_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    first = run(CASES[name](), dtype)
    torch.set_num_threads(5)
    second = run(CASES[name](), dtype)
    assert [output for output in first if not torch.equal(first[output], second[output])] == []


def test_sums_over_many_tiles_have_the_same_bits_for_any_number_of_threads() -> None:
    g = torch.Generator().manual_seed(0)
    y, r, k, v, gate, dout = (torch.randn(1, 2000, 256, generator=g) for _ in range(6))
    vectors = [torch.randn(256, generator=g) for _ in range(3)]
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append(OP.wkv7_output_backward(y, r, k, v, gate, *vectors, 1e-3, dout))
    assert all(torch.equal(x, z) for other in found[1:] for x, z in zip(other, found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixes", [1, 6])
@pytest.mark.usefixtures("device")
def test_a_document_alone_is_bitwise_what_it_is_in_a_pack(mixes: int, dtype: torch.dtype) -> None:
    """The op around the products, whose own rounding may depend on how many rows they have."""
    lengths, width = [40, 17, 0, 16, 5], 128
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    vectors = normal(width), normal(width), torch.rand(mixes, width, generator=g)
    x, branch = normal(1, 78, width), normal(1, 78, width).to(dtype)
    dresidual, dmixed = normal(1, 78, width), [normal(1, 78, width).to(dtype) for _ in range(mixes)]

    def forward_and_backward(rows: slice, lengths: list[int]) -> list[Tensor]:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        residual, stats, _, mixed = OP.norm_mix(x[:, rows], branch[:, rows], *vectors, None, cu_seqlens, 1e-5, dtype)
        dx, dbranch, _, _, again = OP.norm_mix_backward(
            residual, stats, *vectors, None, cu_seqlens, dresidual[:, rows], [z[:, rows] for z in dmixed], None, True
        )
        return [residual, *mixed, dx, dbranch, *again]

    whole = forward_and_backward(slice(0, 78), lengths)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = forward_and_backward(rows, [length])
        assert all(torch.equal(a, b[:, rows]) for a, b in zip(alone, whole, strict=True))
        start += length


@pytest.mark.parametrize("name", IN_A_PACK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("device")
def test_padding_full_of_nan_reaches_nothing(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    clean = run(case, dtype)
    for x in ("x", "branch"):
        case.inputs[x][:, 53:] = float("nan")
    found = run(case, dtype)
    assert [output for output in found if not torch.equal(found[output], clean[output])] == []
    assert (found["product0"][:, 53:] == 0).all()
    assert (found["dx"][:, 53:] == 0).all()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("device", "poisoned")
def test_every_number_is_written(name: str) -> None:
    assert torch.empty(3).isnan().all()
    found = run(CASES[name](), torch.float32)
    assert [output for output, x in found.items() if not x.isfinite().all()] == []


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_definitions(name: str) -> None:
    case = CASES[name]()
    small = {
        "six mixes of a pack": lambda: kernels.norm_mix_case([3, 0, 2], width=4, padding=1, out=2),
        "one mix of a pack": lambda: kernels.norm_mix_case([3, 0, 2], width=4, mixes=1, padding=1, out=2),
        "six mixes of rows": lambda: kernels.norm_mix_case([2], rows=2, width=4, out=2),
        "six mixes without a branch": lambda: kernels.norm_mix_case([3], width=4, branch=False, out=2),
        "inputs of wkv7": lambda: kernels.wkv7_inputs_case(1, width=64, rank=2),
        "inputs of wkv7 in layer 0": lambda: kernels.wkv7_inputs_case(1, width=64, rank=2, residual=False),
        "output of wkv7": lambda: kernels.wkv7_output_case(1, width=64),
        "ReLU² and its projection": lambda: kernels.relu_squared_case(2, width=8),
    }.get(name)
    if small is None:
        pytest.skip("the same op as a narrower case")
    case = small()
    names = list(case.inputs)
    leaves = [x.double().requires_grad_() for x in case.inputs.values()]
    torch.autograd.gradcheck(lambda *x: case.op(**dict(zip(names, x, strict=True))), leaves, fast_mode=True)


def test_opcheck() -> None:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    cu_seqlens, width = torch.tensor([0, 3, 9], dtype=torch.int32), 64
    x, branch, vectors = normal(1, 9, width), normal(1, 9, width), (normal(64), normal(64), normal(6, 64))
    arguments: dict[Any, tuple[Any, ...]] = {
        OP.norm_mix: (x, branch, *vectors, None, cu_seqlens, 1e-5, torch.bfloat16),
        OP.norm_mix_backward: (
            x, normal(9, 2), *vectors, normal(1, 64), None, x, [normal(1, 9, 64) for _ in range(6)], normal(1, 64),
            True,
        ),
        OP.wkv7_inputs: (*(normal(1, 9, width) for _ in range(6)), *(normal(width) for _ in range(5))),
        OP.wkv7_inputs_backward_: (
            *(normal(1, 9, width) for _ in range(6)), [normal(width) for _ in range(5)],
            *(normal(1, 9, width) for _ in range(5)),
        ),
        OP.wkv7_output: (
            *(normal(1, 9, width).requires_grad_() for _ in range(5)), *(normal(64) for _ in range(3)), 1e-3
        ),
        OP.wkv7_output_backward: (
            *(normal(1, 9, width) for _ in range(5)), *(normal(64) for _ in range(3)), 1e-3, x
        ),
        OP.relu_squared: (x,),
        OP.relu_squared_backward_: (x, branch),
        OP.cross_entropy_: (normal(5, 30), torch.tensor([0, 3, -100, 29, 7]), None, True),
    }  # fmt: skip
    for op, values in arguments.items():
        torch.library.opcheck(op.default, values)


def test_weights_cast_together_are_each_cast_and_so_are_their_gradients() -> None:
    weights = [
        torch.randn(3, 4, requires_grad=True),
        torch.randn(5, requires_grad=True),
        torch.randn(2, requires_grad=True),
    ]
    cast = cast_together(weights, torch.bfloat16)
    assert all(torch.equal(x, weight.bfloat16()) for x, weight in zip(cast, weights, strict=True))
    found = torch.autograd.grad((cast[0] * 3).sum() + cast[1].sum(), weights, allow_unused=True)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], torch.full((3, 4), 3.0))
    assert found[2] is None
    assert cast_together(weights, torch.float32) is weights


def test_a_target_that_is_no_column() -> None:
    with pytest.raises(ValueError, match=r"cross_entropy_: target 30, expected 0 to 29, or -100 for none"):
        cross_entropy_(torch.zeros(2, 30), torch.tensor([0, 30]), gradient=True)


def test_boundaries_that_do_not_rise_from_zero() -> None:
    case = kernels.norm_mix_case([4, -1])
    with pytest.raises(ValueError, match=r"mixed_projections: cu_seqlens is \[0, 4, 3\], expected to rise from 0 to 3"):
        run(case, torch.float32)


def test_no_token_at_all() -> None:
    found = run(kernels.norm_mix_case([]), torch.float32)
    assert found["residual"].shape == (1, 0, 128)
    assert all((x == 0).all() for x in found.values())


@pytest.mark.parametrize(
    "targets", [torch.zeros(3), torch.zeros(3).int(), torch.zeros(2).long(), torch.zeros(1).long()]
)
def test_targets_that_the_kernel_would_misread_are_refused(targets: Tensor) -> None:
    with pytest.raises(ValueError, match=r"targets are .*, expected \(3,\) torch.int64 on cpu"):
        cross_entropy_(torch.zeros(3, 64), targets, gradient=False)
