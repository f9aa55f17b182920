"""The definition of WKV-7 itself, against sums written out by hand and finite differences."""

from __future__ import annotations

import torch

from streaming_rwkv.ops.reference import wkv7_reference


def _column(*values: float) -> torch.Tensor:
    """(1, T, 1, 1): one head of size 1, where the recurrence is one of plain numbers."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)


def test_one_channel_by_hand():
    # d = 1/2: S1 = v k = 6; S2 = S1 d + S1 a b + v k = 3 + 6·(-1)·0.5 + 1 = 1; y = S r.
    half = torch.tensor(0.5, dtype=torch.float64).log().item()
    y, state = wkv7_reference(
        r=_column(1, 10), log_decay=_column(half, half), k=_column(2, 1), v=_column(3, 1), a=_column(7, -1),
        b=_column(9, 0.5),
    )  # fmt: skip
    torch.testing.assert_close(y.flatten().tolist(), [6.0, 10.0])
    torch.testing.assert_close(state.flatten().tolist(), [1.0])


def test_the_state_is_value_by_key():
    r, k, v = torch.zeros(3, 1, 1, 1, 4, dtype=torch.float64)
    r[..., 2], k[..., 2], v[..., 1] = 1.0, 5.0, 1.0
    y, state = wkv7_reference(r, -torch.ones_like(r), k, v, torch.zeros_like(r), torch.zeros_like(r))
    assert state[0, 0].nonzero().tolist() == [[1, 2]]
    assert y.flatten().tolist() == [0.0, 5.0, 0.0, 0.0]


def test_gradcheck_in_float64():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 7, 1, 3, dtype=torch.float64, generator=generator) * 0.5 for _ in range(6)]
    inputs[1] = -inputs[1].abs()
    inputs.append(torch.randn(4, 1, 3, 3, dtype=torch.float64, generator=generator))
    cu_seqlens = torch.tensor([0, 3, 3, 4, 6], dtype=torch.int32)  # an empty document, and one row of padding

    def op(*xs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return wkv7_reference(*xs[:6], initial_state=xs[6], cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in inputs])


def test_rows_are_documents_without_cu_seqlens():
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(3, 5, 2, 4, dtype=torch.float64, generator=generator) for _ in range(6)]
    inputs[1] = -inputs[1].abs()
    y, state = wkv7_reference(*inputs)
    flat, flat_state = wkv7_reference(
        *(x.reshape(1, 15, 2, 4) for x in inputs), cu_seqlens=torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    )
    torch.testing.assert_close(y.reshape(1, 15, 2, 4), flat)
    torch.testing.assert_close(state, flat_state)


def test_padding_full_of_nan_reaches_nothing():
    inputs = [torch.full((1, 4, 1, 2), float("nan")) for _ in range(6)]
    for x in inputs:
        x[:, :3] = -0.5
        x.requires_grad_()
    y, state = wkv7_reference(*inputs, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))
    (y.sum() + state.sum()).backward()
    assert y[0, 3].tolist() == [[0.0, 0.0]]
    for x in inputs:
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad[0, 3].tolist() == [[0.0, 0.0]]
