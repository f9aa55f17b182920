"""The network: against two public implementations, packed against alone, with a carried state, with less memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.rwkv7 import RWKV7

Build = Callable[..., RWKV7]
LENGTHS = [5, 1, 17, 9]
PACKED = 32 + 4  # four rows of padding
BOUNDS = [0, 5, 6, 23, 32]


def tokens_and_targets(vocab_size: int = 97) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(vocab_size, (2, 1, PACKED), generator=generator)
    targets[:, BOUNDS[-1] :] = -100
    return tokens, targets


def cu_seqlens() -> Tensor:
    return torch.tensor(BOUNDS, dtype=torch.int32)


@pytest.mark.parametrize("oracle", ["rwkv", "rwkv7_hf"])
def test_logits_equal_a_public_implementation(oracle: str, oracles: Any) -> None:
    expected = oracles.logits[oracle]
    with torch.no_grad():
        logits = oracles.model(torch.tensor([oracles.tokens]))[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_document_in_a_pack_gives_the_same_logits_as_alone(
    dtype: torch.dtype, tolerance: float, random_model: Build
) -> None:
    """Logits, loss, and its share of every parameter's gradient. Not bitwise: a GEMM's rounding depends on its rows."""
    model = random_model(dtype=dtype)
    tokens, targets = tokens_and_targets()
    logits = model(tokens, cu_seqlens=cu_seqlens())
    for start, stop in itertools.pairwise(BOUNDS):
        inside = slice(start, stop)
        alone = model(tokens[:, inside])
        torch.testing.assert_close(logits[:, inside], alone, rtol=0, atol=tolerance)

        only_this = torch.full_like(targets, -100)
        only_this[:, inside] = targets[:, inside]
        packed_nll = model(tokens, cu_seqlens=cu_seqlens(), targets=only_this)
        nll = model(tokens[:, inside], targets=targets[:, inside])
        torch.testing.assert_close(packed_nll[:, inside], nll, rtol=0, atol=tolerance)
        gradients = torch.autograd.grad(packed_nll.sum(), list(model.parameters()))
        expected = torch.autograd.grad(nll.sum(), list(model.parameters()))
        largest = max(gradient.abs().max() for gradient in expected).item()
        for (name, _), a, b in zip(model.named_parameters(), gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest, msg=lambda text, name=name: name + text)


def test_documents_in_a_pack_do_not_influence_each_other(random_model: Build) -> None:
    model = random_model()
    tokens, targets = tokens_and_targets()
    before = model(tokens, cu_seqlens=cu_seqlens(), targets=targets)
    changed = tokens.clone()
    changed[:, 6:23] = (changed[:, 6:23] + 1) % 97
    changed[:, 32:] = 11  # padding
    after = model(changed, cu_seqlens=cu_seqlens(), targets=targets)
    assert torch.equal(before[:, :6], after[:, :6])
    assert torch.equal(before[:, 23:], after[:, 23:])
    assert not torch.equal(before[:, 6:23], after[:, 6:23])


def test_padding_has_neither_loss_nor_gradient(random_model: Build) -> None:
    model = random_model(dtype=torch.float64)
    tokens, targets = tokens_and_targets()
    nll = model(tokens, cu_seqlens=cu_seqlens(), targets=targets)
    assert nll[:, 32:].tolist() == [[0, 0, 0, 0]]
    padded = torch.autograd.grad(nll.sum(), list(model.parameters()))
    whole = model(tokens[:, :32], cu_seqlens=cu_seqlens(), targets=targets[:, :32])
    exact = torch.autograd.grad(whole.sum(), list(model.parameters()))
    torch.testing.assert_close(padded, exact, rtol=1e-11, atol=1e-11)


def test_rows_of_a_batch_are_documents(random_model: Build) -> None:
    model = random_model(dtype=torch.float64)
    tokens = torch.randint(97, (3, 7), generator=torch.Generator().manual_seed(0))
    packed = model(tokens.view(1, 21), cu_seqlens=torch.tensor([0, 7, 14, 21], dtype=torch.int32))
    torch.testing.assert_close(model(tokens), packed.view(3, 7, -1), rtol=0, atol=1e-12)


def test_the_recurrent_form_gives_the_parallel_forms_logits(random_model: Build) -> None:
    model = random_model(dtype=torch.float64)
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens)
        after, state = model.step(tokens[:, :5])  # a prompt, then token by token
        torch.testing.assert_close(after, logits[:, 4], rtol=0, atol=1e-12)
        for index in range(5, 12):
            after, state = model.step(tokens[:, index : index + 1], state)
            torch.testing.assert_close(after, logits[:, index], rtol=0, atol=1e-12)


def test_the_state_does_not_grow(random_model: Build) -> None:
    model = random_model()
    tokens = torch.zeros(1, 40, dtype=torch.int64)
    with torch.no_grad():
        sizes = [sum(x.numel() for layer in model.step(tokens[:, :count])[1] for x in layer) for count in (1, 40)]
    assert sizes == [3 * (128 + 2 * 64 * 64 + 128)] * 2


def test_activation_checkpointing_changes_memory_and_no_bit(random_model: Build) -> None:
    tokens, targets = tokens_and_targets()
    gradients, saved_bytes = [], []
    for activation_checkpointing in (False, True):
        model = random_model(activation_checkpointing=activation_checkpointing)
        saved: dict[int, int] = {}

        def count(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            nll = model(tokens, cu_seqlens=cu_seqlens(), targets=targets)
        saved_bytes.append(sum(saved.values()) - sum(p.nbytes for p in model.parameters()))
        gradients.append(torch.autograd.grad(nll.sum(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert saved_bytes[1] < 0.2 * saved_bytes[0]


def test_bfloat16_autocast_stays_near_float32(random_model: Build) -> None:
    model = random_model()
    tokens, targets = tokens_and_targets()
    exact = model(tokens, cu_seqlens=cu_seqlens(), targets=targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens, cu_seqlens=cu_seqlens()).dtype == torch.bfloat16
        nll = model(tokens, cu_seqlens=cu_seqlens(), targets=targets)
    nll.sum().backward()
    assert nll.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in model.parameters())  # fmt: skip
    # Products in 8 bits, summed over 3 layers: some percent of a loss of 5.
    assert (nll - exact).abs().max() < 0.15
    assert (nll.sum() - exact.sum()).abs() / 32 < 0.02


def test_all_in_bfloat16_runs_as_the_reference_does(random_model: Build) -> None:
    model = random_model()
    tokens, targets = tokens_and_targets()
    exact = model(tokens, cu_seqlens=cu_seqlens(), targets=targets)
    nll = model.bfloat16()(tokens, cu_seqlens=cu_seqlens(), targets=targets)
    assert (nll - exact).abs().max() < 0.3


def test_every_parameter_is_trained(random_model: Build) -> None:
    """DDP and FSDP want a gradient for each; layer 0's unused value residual is not held at all."""
    model = random_model()
    tokens, targets = tokens_and_targets()
    model(tokens, cu_seqlens=cu_seqlens(), targets=targets).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert not [name for name, _ in model.named_parameters() if name.startswith("blocks.0.att.v0")]


def test_blocks_are_marked_for_sharding(random_model: Build) -> None:
    assert all(block._fsdp_wrap for block in random_model().blocks)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), r"found the shape \(1, 0\), expected \(B, T\) with T of at least 1"),
        (torch.zeros(3, dtype=torch.int64), r"found the shape \(3,\), expected"),
        (torch.tensor([[3, 97]]), "found ids from 3 to 97, expected 0 to 96"),
        (torch.tensor([[-1, 5]]), "found ids from -1 to 5, expected 0 to 96"),
    ],
)
def test_tokens_that_cannot_be_read_are_refused(tokens: torch.Tensor, message: str) -> None:
    network = RWKV7(RWKV7Config(vocab_size=97, hidden_size=64, num_layers=1))
    for read in (network, network.step):
        with pytest.raises(ValueError, match=f"tokens: {message}"):
            read(tokens)


@pytest.mark.parametrize("cu_seqlens", [torch.tensor([[0, 4]], dtype=torch.int32), torch.tensor([]).int()])
def test_boundaries_that_are_no_row_of_numbers_are_refused(cu_seqlens: Tensor) -> None:
    network = RWKV7(RWKV7Config(vocab_size=97, hidden_size=64, num_layers=1))
    with pytest.raises(ValueError, match=r"cu_seqlens has the shape .*, expected \(num_documents \+ 1,\)"):
        network(torch.zeros(1, 4, dtype=torch.int64), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_boundaries_of_another_type_are_refused_before_a_kernel_reads_them(dtype: torch.dtype) -> None:
    network = RWKV7(RWKV7Config(vocab_size=97, hidden_size=64, num_layers=1))
    with pytest.raises(ValueError, match=rf"cu_seqlens is {dtype}, expected torch.int32"):
        network(torch.zeros(1, 4, dtype=torch.int64), cu_seqlens=torch.tensor([0, 4], dtype=dtype))


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (torch.zeros(1, 3, dtype=torch.int64), r"\(1, 3\) torch.int64"),
        (torch.zeros(1, 4, dtype=torch.int32), r"\(1, 4\) torch.int32"),
        (torch.zeros(1, 4, dtype=torch.bool), r"\(1, 4\) torch.bool"),
        (torch.zeros(1, 4, dtype=torch.float64), r"\(1, 4\) torch.float64"),
    ],
)
def test_targets_of_another_shape_or_type_are_refused(targets: torch.Tensor, found: str) -> None:
    network = RWKV7(RWKV7Config(vocab_size=97, hidden_size=64, num_layers=1))
    with pytest.raises(
        ValueError, match=rf"targets: found {found}, expected \(1, 4\) torch.int64, the shape of tokens"
    ):
        network(torch.zeros(1, 4, dtype=torch.int64), targets=targets)


def test_a_state_of_another_model_or_of_other_rows_is_refused() -> None:
    network = RWKV7(RWKV7Config(vocab_size=97, hidden_size=64, num_layers=2))
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    _, state = network.step(tokens)
    with pytest.raises(ValueError, match="state: found that of 1 layers, this model has 2"):
        network.step(tokens, state[:1])
    with pytest.raises(ValueError, match=r"last has the shape \(2, 64\), expected \(1, 64\), a token of each row"):
        network.step(tokens[:1], state)
