"""Initial values against the reference trainer's formulas, written out per channel as it has them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config

WIDTH, LAYERS, VOCABULARY, HEAD = 128, 3, 300, 64


def fresh(*, seed: int = 1, **shape: int) -> RWKV7:
    values = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": LAYERS, **shape}
    model = RWKV7(RWKV7Config.model_validate(values))
    initialize(model, seed=seed)
    return model


@pytest.fixture(scope="module")
def parameters() -> dict[str, Tensor]:
    return dict(fresh().named_parameters())


def channels(formula: object) -> Tensor:
    return torch.tensor([formula(n) for n in range(WIDTH)], dtype=torch.float64)  # type: ignore[operator]


def zigzag(n: int) -> float:
    ramp = (n % HEAD - (HEAD - 1) / 2) / ((HEAD - 1) / 2)
    return ramp * abs(ramp)


def linear(n: int) -> float:
    return n / (WIDTH - 1) - 0.5


@pytest.mark.parametrize("layer", range(LAYERS))
def test_vectors_are_initialized_as_the_reference_trainer_does(parameters: dict[str, Tensor], layer: int) -> None:
    from_one, to_one = 1 - layer / LAYERS, layer / (LAYERS - 1)
    expected = {
        "x_r": lambda n: 1 - (n / WIDTH) ** (0.2 * from_one),
        "x_g": lambda n: 1 - (n / WIDTH) ** (0.2 * from_one),
        "x_w": lambda n: 1 - (n / WIDTH) ** (0.9 * from_one),
        "x_a": lambda n: 1 - (n / WIDTH) ** (0.9 * from_one),
        "x_k": lambda n: 1 - (n / WIDTH) ** (0.7 * from_one),
        "x_v": lambda n: 1 - (n / WIDTH) ** (0.7 * from_one),
        "w0": lambda n: -6 + 6 * (n / (WIDTH - 1)) ** (1 + to_one**0.3) + 0.5 + 2.5 * zigzag(n),
        "a0": lambda n: -0.19 + 0.3 * zigzag(n) + 0.4 * linear(n),
        "k_k": lambda n: 0.71 - 0.1 * linear(n),
        "k_a": lambda n: 1.02,
        "r_k": lambda n: -0.04,
        "ln_x.weight": lambda n: ((1 + layer) / LAYERS) ** 0.7,
        "ln_x.bias": lambda n: 0,
    }
    if layer > 0:
        expected["v0"] = lambda n: 0.73 - 0.4 * linear(n)
    for name, formula in expected.items():
        value = parameters[f"blocks.{layer}.att.{name}"].double().flatten()
        torch.testing.assert_close(value, channels(formula), rtol=1e-6, atol=1e-7, msg=name)
    ffn = parameters[f"blocks.{layer}.ffn.x_k"].double().flatten()
    torch.testing.assert_close(ffn, channels(lambda n: 1 - (n / WIDTH) ** (from_one**4)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("head.weight", 0.5 * math.sqrt(VOCABULARY / WIDTH)),
        ("blocks.1.att.receptance.weight", 1.0),
        ("blocks.1.att.value.weight", 1.0),
        ("blocks.1.att.key.weight", 0.1),
        ("blocks.1.ffn.key.weight", 1.0),
        ("blocks.1.att.w2", 0.1),
        ("blocks.1.att.a2", 0.1),
        ("blocks.1.att.v2", 0.1),
        ("blocks.1.att.g2", 0.1),
    ],
)
def test_matrices_are_initialized_as_orthogonal_ones(parameters: dict[str, Tensor], name: str, gain: float) -> None:
    matrix = parameters[name].double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    identity = torch.eye(matrix.shape[0], dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, gain**2 * identity, rtol=0, atol=1e-5 * gain**2)


def test_a_tall_lora_gains_by_its_shape() -> None:
    matrix = dict(fresh(num_layers=1, gate_rank=512).named_parameters())["blocks.0.att.g2"].double()  # (512, 128)
    torch.testing.assert_close(matrix.T @ matrix, 0.01 * 4 * torch.eye(WIDTH).double(), rtol=0, atol=1e-6)


def test_a_vocabulary_no_larger_than_the_width_has_gain_one_half() -> None:
    matrix = dict(fresh(num_layers=1, vocab_size=100).named_parameters())["head.weight"].double()
    torch.testing.assert_close(matrix @ matrix.T, 0.25 * torch.eye(100).double(), rtol=0, atol=1e-6)


def test_zeros_ones_and_the_embedding_are_initialized_as_such(parameters: dict[str, Tensor]) -> None:
    zero = ("att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1", "att.g1", "ln1.bias", "ln2.bias")
    assert all(parameters[f"blocks.2.{name}"].abs().max() == 0 for name in zero)
    ones = ("blocks.0.ln0.weight", "blocks.0.ln1.weight", "blocks.2.ln2.weight", "ln_out.weight")
    assert all((parameters[name] == 1).all() for name in ones)
    embedding = parameters["emb.weight"]
    assert 0.99e-4 < embedding.abs().max() <= 1e-4
    assert embedding.mean().abs() < 2e-6
    assert embedding.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=0.02)


def test_a_single_layer_has_finite_values() -> None:
    assert all(parameter.isfinite().all() for parameter in fresh(num_layers=1).parameters())


def test_the_same_seed_gives_the_same_bits_whatever_came_before() -> None:
    torch.manual_seed(5)
    one = fresh()
    torch.set_num_threads(1)
    try:
        two = fresh()
    finally:
        torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, fresh(seed=2).head.weight)
    # Parameters of one shape differ from each other, and a deeper model begins alike.
    weights = dict(one.named_parameters())
    assert not torch.equal(weights["blocks.0.att.receptance.weight"], weights["blocks.0.att.value.weight"])
    deeper = dict(fresh(num_layers=5).named_parameters())
    assert torch.equal(weights["blocks.2.att.value.weight"], deeper["blocks.2.att.value.weight"])


def test_the_first_loss_is_that_of_uniform_guessing() -> None:
    """ln V + 0.125 on average over all targets: with gain ½ the logits have variance ¼, and E ln Σ exp = ln V + ⅛."""
    tokens = torch.arange(64).unsqueeze(0)
    with torch.no_grad():
        logits = fresh(vocab_size=4096)(tokens)
    loss = (logits.logsumexp(-1) - logits.mean(-1)).mean()
    assert loss.item() == pytest.approx(math.log(4096) + 0.125, abs=0.01)
