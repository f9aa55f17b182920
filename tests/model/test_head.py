"""The chunked head and loss against the plain ones: logits, cross-entropy, L2Wrap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from streaming_rwkv.model.head import Head, head_cross_entropy

TOKENS, WIDTH, VOCABULARY = 23, 16, 50


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
    targets[0, [4, 5, 22]] = -100
    return x, weight, targets


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each target, and what is to be differentiated in its place."""
    logits = x @ weight.T
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    wrap = 0.5 * 1e-4 * logits.amax(-1) ** 2 * (targets != -100)
    return nll, nll + wrap


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda nll: nll.sum(),
    "mean of targets": lambda nll: nll.sum() / 20,
    "weighted": lambda nll: (nll * torch.linspace(-1, 2, TOKENS, dtype=nll.dtype)).sum(),
    "masked": lambda nll: nll[nll > 1].sum(),
    "one target": lambda nll: nll[0, 7],
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 23, 1000])
def test_loss_and_gradients_equal_the_plain_form(chunk_tokens: int, reduction: str) -> None:
    x, weight, targets = inputs()
    nll = head_cross_entropy(x, weight, targets, chunk_tokens=chunk_tokens)
    expected, differentiated = plain(x, weight, targets)
    torch.testing.assert_close(nll, expected, rtol=1e-13, atol=1e-13)

    reduce = REDUCTIONS[reduction]
    gradients = torch.autograd.grad(reduce(nll), (x, weight))
    if reduction == "masked":
        expected_gradients = torch.autograd.grad(differentiated[expected > 1].sum(), (x, weight))
    else:
        expected_gradients = torch.autograd.grad(reduce(differentiated), (x, weight))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-13)


def test_l2wrap_is_the_reference_trainers_mean_over_targets() -> None:
    x, weight, targets = inputs()
    targets[:] = 3
    (gradient,) = torch.autograd.grad(head_cross_entropy(x, weight, targets, chunk_tokens=8).mean(), x)
    logits = x @ weight.T
    largest, index = logits.max(-1, keepdim=True)
    wrap = torch.zeros_like(logits).scatter_(-1, index, largest * 1e-4 / TOKENS)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (of_logits,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, (of_logits + wrap) @ weight, rtol=1e-12, atol=1e-15)


def test_an_ignored_target_has_neither_loss_nor_gradient() -> None:
    x, weight, targets = inputs()
    nll = head_cross_entropy(x, weight, targets, chunk_tokens=8)
    (gradient,) = torch.autograd.grad(nll.sum(), x)
    assert nll[0, [4, 5, 22]].tolist() == [0, 0, 0]
    assert gradient[0, [4, 5, 22]].abs().max() == 0
    nothing = head_cross_entropy(x, weight, torch.full_like(targets, -100), chunk_tokens=8)
    assert nothing.sum() == 0
    assert torch.autograd.grad(nothing.sum(), x)[0].abs().max() == 0


def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    x, weight, targets = inputs()
    loss = head_cross_entropy(x, weight, targets, chunk_tokens=8).sum() / 20
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    for again, before in zip(torch.autograd.grad(loss, (x, weight)), first, strict=True):
        # A float64 sum of n terms may differ by n roundings of its terms where threads split it anew; each entry is a
        # sum over tokens or the vocabulary, some of them near zero by cancellation, so the largest is the measure.
        rounding = max(TOKENS, VOCABULARY) * torch.finfo(torch.float64).eps
        assert float((again - before).abs().max()) <= rounding * float(before.abs().max())


def test_a_sum_costs_three_products_and_evaluation_one() -> None:
    x, weight, targets = inputs()
    product = 2 * TOKENS * WIDTH * VOCABULARY
    with FlopCounterMode(display=False) as training:
        (head_cross_entropy(x, weight, targets, chunk_tokens=8).view(TOKENS).sum() / 20).backward()
    with FlopCounterMode(display=False) as evaluation, torch.no_grad():
        head_cross_entropy(x, weight, targets, chunk_tokens=8)
    assert (training.get_total_flops(), evaluation.get_total_flops()) == (3 * product, product)


def test_large_logits_stay_finite() -> None:
    x, weight, targets = inputs(torch.float32)
    nll = head_cross_entropy(x * 1e4, weight, targets, chunk_tokens=8)
    assert nll.isfinite().all()
    assert nll.max() > 1e4


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_differs_by_the_rounding_of_products_alone(autocast: bool) -> None:
    x, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        x.copy_(x.bfloat16())
        weight.copy_(weight.bfloat16())
    expected, differentiated = plain(x, weight, targets)
    assert 8 < (x @ weight.T).abs().max() < 16
    expected_gradients = torch.autograd.grad(differentiated.sum(), (x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        narrow = [x, weight] if autocast else [x.bfloat16(), weight.bfloat16()]
        nll = head_cross_entropy(*narrow, targets, chunk_tokens=8)
    gradients = torch.autograd.grad(nll.sum(), (x, weight))
    assert nll.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32]
    # Logits below 16 are rounded to 8 bits, so by at most 2^-5; the loss is the difference of two such numbers.
    torch.testing.assert_close(nll, expected, rtol=0, atol=2**-4)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert (gradient - exact).norm() < 0.02 * exact.norm()


def test_without_targets_it_is_a_projection() -> None:
    head = Head(WIDTH, VOCABULARY, chunk_tokens=8)
    x = torch.randn(2, 3, WIDTH)
    assert torch.equal(head(x), x @ head.weight.T)
