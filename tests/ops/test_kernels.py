"""Each kernel against the definition in float64, and against itself: packs, orders, lengths, padding, memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from streaming_rwkv.ops import wkv7
from streaming_rwkv.ops.testing import INPUTS, Case, Decays, errors, make_case, run, run_reference

RunCase = Callable[[Case], dict[str, Tensor]]
OUTPUTS = ("y", "final_state")
# One token, either side of a chunk of 16, an empty document, many chunks.
LENGTHS = (1, 15, 16, 17, 31, 0, 300)


@functools.cache
def expected(lengths: tuple[int, ...], decays: Decays, heads: int) -> dict[str, Tensor]:
    return run_reference(make_case(lengths, decays=decays, heads=heads))


def check_float32(found: dict[str, Tensor], reference: dict[str, Tensor], decays: Decays) -> None:
    """‖Δ‖ / ‖reference‖ of a sum over thousands of steps in float32, where nothing cancels: a few times 2^-24."""
    # Slow decays remember thousands of roundings. Fast ones are undone by a division in CUDA's backward pass: over
    # 16 steps at the limit, rounding grows by exp(0.6065 · 16) = 16,000.
    output_bound = 5e-6 if decays == "all slowest" else 1e-6
    gradient_bound = 5e-4 if decays == "all fastest" else 1e-5
    for name, error in errors(found, reference).items():
        assert error <= (output_bound if name in OUTPUTS else gradient_bound), name


@pytest.mark.parametrize("decays", ["whole range", "all fastest", "all slowest"])
def test_float32_equals_the_definition(kernel: RunCase, decays: Decays) -> None:
    check_float32(kernel(make_case(LENGTHS, decays=decays)), expected(LENGTHS, decays, 2), decays)


@pytest.mark.parametrize("lengths", [(2047, 2048), pytest.param((5000,), marks=pytest.mark.slow)])
@pytest.mark.parametrize("decays", ["whole range", "all slowest"])
def test_float32_equals_the_definition_over_thousands_of_tokens(
    kernel: RunCase, decays: Decays, lengths: tuple[int, ...]
) -> None:
    check_float32(kernel(make_case(lengths, decays=decays, heads=1)), expected(lengths, decays, 1), decays)


@pytest.mark.parametrize("decays", ["whole range", "all fastest", "all slowest"])
def test_bfloat16_is_float32_rounded_once(kernel: RunCase, decays: Decays) -> None:
    found = kernel(make_case(LENGTHS, decays=decays, dtype=torch.bfloat16))
    # A uniformly distributed rounding error of 2^-9 at most gives 1.7e-3.
    assert max(errors(found, expected(LENGTHS, decays, 2)).values()) <= 2.5e-3
    assert {found[name].dtype for name in ("y", *(f"d{name}" for name in INPUTS))} == {torch.bfloat16}
    assert found["final_state"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_alone_is_bitwise_what_it_is_in_any_pack_in_any_order(kernel: RunCase, dtype: torch.dtype) -> None:
    case = make_case([40, 17, 0, 16, 65], dtype=dtype, padding=3)
    whole = kernel(case)
    order = [4, 2, 0, 3, 1]
    shuffled = kernel(select(case, order))
    for place, document in enumerate(order):
        alone = kernel(select(case, [document]))
        for name in whole:
            expected = part(whole, name, case, document)
            assert torch.equal(part(alone, name, select(case, [document]), 0), expected), (name, document)
            assert torch.equal(part(shuffled, name, select(case, order), place), expected), (name, document)


def select(case: Case, documents: list[int]) -> Case:
    """A pack of these documents, in this order, without padding."""
    bounds = case.cu_seqlens.tolist()
    rows = [row for d in documents for row in range(bounds[d], bounds[d + 1])]
    lengths = [bounds[d + 1] - bounds[d] for d in documents]
    return Case(
        inputs=[x[:, rows] for x in case.inputs],
        initial_state=case.initial_state[documents],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        dy=case.dy[:, rows],
        dfinal_state=case.dfinal_state[documents],
    )


def part(found: dict[str, Tensor], name: str, case: Case, document: int) -> Tensor:
    if "state" in name:
        return found[name][document]
    return found[name][:, case.cu_seqlens[document] : case.cu_seqlens[document + 1]]


def test_the_same_bits_every_time(kernel: RunCase) -> None:
    case = make_case([40, 33])
    assert_same(kernel(case), kernel(case))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    case = make_case([2, 70, 33, 500], heads=4)  # several heads in a unit with few threads, one with many
    torch.set_num_threads(2)
    expected = run(wkv7, case)
    torch.set_num_threads(threads)
    assert_same(run(wkv7, case), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_full_of_nan_reaches_nothing(kernel: RunCase, dtype: torch.dtype) -> None:
    clean, padded = make_case([40, 17], dtype=dtype), make_case([40, 17], dtype=dtype, padding=20)
    for x, y in zip((*padded.inputs, padded.dy), (*clean.inputs, clean.dy), strict=True):
        x[:, :57], x[:, 57:] = y, float("nan")
    padded = padded._replace(initial_state=clean.initial_state, dfinal_state=clean.dfinal_state)
    found, expected = kernel(padded), kernel(clean)
    for name, x in found.items():
        if "state" in name:
            assert torch.equal(x, expected[name]), name
        else:
            assert torch.equal(x[:, :57], expected[name]), name
            assert (x[:, 57:] == 0).all(), name


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
def test_every_number_is_written(kernel: RunCase) -> None:
    found = kernel(make_case(LENGTHS, padding=5))
    assert [name for name, x in found.items() if not x.isfinite().all()] == []


@pytest.mark.parametrize("cut", [16, 40, 64, 77])
def test_a_document_in_two_pieces_with_the_state_between_is_the_document(kernel: RunCase, cut: int) -> None:
    case = make_case([100])
    whole = kernel(case)
    zeros = torch.zeros_like(case.dfinal_state)
    # The second piece's gradient of its initial state is what the first piece needs, so the second runs first.
    first = slice_of(case, 0, cut)
    state = kernel(first._replace(dfinal_state=zeros))["final_state"]
    second = kernel(slice_of(case, cut, 100)._replace(initial_state=state))
    pieces = kernel(first._replace(dfinal_state=second["dinitial_state"]))
    together = {
        name: torch.cat([pieces[name], second[name]], dim=1) for name in whole if "state" not in name
    } | {"final_state": second["final_state"], "dinitial_state": pieces["dinitial_state"]}  # fmt: skip
    assert max(errors(together, whole).values()) <= 1e-5


def slice_of(case: Case, start: int, stop: int) -> Case:
    return case._replace(
        inputs=[x[:, start:stop].contiguous() for x in case.inputs],
        cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
        dy=case.dy[:, start:stop].contiguous(),
    )


def test_no_document_at_all(kernel: RunCase) -> None:
    found = kernel(make_case([], padding=3))
    assert found["final_state"].shape == (0, 2, 64, 64)
    assert all((x == 0).all() for x in found.values())


def test_a_state_that_fades_away_ends_in_zero_not_in_subnormal_numbers() -> None:
    case = make_case([500], decays="all fastest")
    for x in (case.inputs[2], case.inputs[3], case.inputs[4]):
        x[:, 1:] = 0  # k, v, a: nothing new, nothing removed; 0.545^500 is 1e-132
    found = run(wkv7, case._replace(dy=torch.zeros_like(case.dy)))
    for name, x in found.items():
        assert ((x == 0) | (x.abs() >= torch.finfo(torch.float32).tiny)).all(), name
    assert (found["final_state"] == 0).all()


def test_a_decay_beyond_any_float_is_a_full_reset() -> None:
    case = make_case([40])
    case.inputs[1][:, 20] = -1000.0
    check_float32(run(wkv7, case), run_reference(case), "whole range")
