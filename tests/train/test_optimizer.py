"""Which parameter learns how, and how the learning rate goes."""

from __future__ import annotations

import math

import pytest
import torch

from streaming_rwkv.config import ConfigError, validate
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import build_optimizer, lr_multiplier, parameter_groups


def small_model() -> RWKV7:
    model = RWKV7(RWKV7Config(vocab_size=50, hidden_size=64, num_layers=2))
    initialize(model, seed=0)
    return model


def test_every_parameter_is_in_the_reference_trainers_group() -> None:
    model = small_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["name"]: ({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in parameter_groups(model, lr=1e-3, weight_decay=0.1)
    }
    matrices = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]
    decayed = {f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in matrices} | {"emb.weight", "head.weight"}
    doubled = {"blocks.0.att.w0", "blocks.1.att.w0"}
    assert groups["decay"] == (decayed, 1e-3, 0.1)
    assert groups["double rate"] == (doubled, 2e-3, 0.0)
    assert groups["no decay"] == (set(names.values()) - decayed - doubled, 1e-3, 0.0)


def test_a_wrapped_network_has_the_same_groups() -> None:
    """Composer and FSDP put the network below others; the first dimension of a shard may be 0."""
    wrapped = torch.nn.ModuleDict({"network": small_model()})
    sizes = [len(group["params"]) for group in parameter_groups(wrapped, lr=1, weight_decay=1)]
    assert sizes == [len(group["params"]) for group in parameter_groups(small_model(), lr=1, weight_decay=1)]


def test_adamw_has_the_reference_trainers_settings() -> None:
    optimizer = build_optimizer(small_model(), OptimizerConfig())
    assert type(optimizer) is torch.optim.AdamW
    assert [group["lr"] for group in optimizer.param_groups] == [6e-4, 12e-4, 6e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0, 0.001]
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.99), 1e-18)}


def test_weight_decay_is_not_scaled_by_gradients() -> None:
    model = small_model()
    before = model.head.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, OptimizerConfig(lr=0.5, weight_decay=0.1)).step()
    torch.testing.assert_close(model.head.weight, before * (1 - 0.5 * 0.1))


def multipliers(config: OptimizerConfig, *, at: list[int], total: int = 1000) -> list[float]:
    return [lr_multiplier(config, tokens_seen=tokens, total_tokens=total) for tokens in at]


def test_cosine_falls_from_lr_to_lr_final() -> None:
    config = OptimizerConfig(lr=1.0, lr_final=0.2)
    # halfway it is at the mean; a quarter of the way at 0.6 + 0.4·cos(45°)
    expected = [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.2, 0.2]
    assert multipliers(config, at=[0, 250, 500, 1000, 2000]) == pytest.approx(expected)


def test_warm_up_rises_from_one_percent_and_cosine_starts_after_it() -> None:
    config = OptimizerConfig(lr=1.0, lr_final=0.2, warmup_tokens=200)
    assert multipliers(config, at=[0, 100, 200, 600, 1000]) == pytest.approx([0.01, 0.505, 1.0, 0.6, 0.2])


def test_wsd_is_constant_and_then_falls_linearly() -> None:
    config = OptimizerConfig(lr=1.0, lr_final=0.2, warmup_tokens=100, schedule="wsd", decay_tokens=200)
    at = [0, 50, 100, 799, 800, 850, 900, 1000, 1500]
    assert multipliers(config, at=at) == pytest.approx([0.01, 0.505, 1, 1, 1, 0.8, 0.6, 0.2, 0.2])


def test_equal_rates_stay_equal() -> None:
    config = OptimizerConfig(lr=0.3, lr_final=0.3)
    assert multipliers(config, at=[0, 300, 1000]) == pytest.approx([1, 1, 1])


def test_the_schedule_depends_on_tokens_alone() -> None:
    """Twice the tokens per step, half the steps: the same rates at the same tokens."""
    config = OptimizerConfig(warmup_tokens=100)
    assert multipliers(config, at=[0, 200, 400]) == multipliers(config, at=[0, 100, 200, 300, 400])[::2]


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"lr": 1e-4, "lr_final": 5e-4}, "lr_final: found 0.0005, above lr 0.0001; the rate must not rise"),
        ({"schedule": "wsd"}, "decay_tokens: schedule wsd needs it; use a tenth to a fifth of all tokens"),
        ({"decay_tokens": 9}, "decay_tokens: schedule cosine does not use it; leave it out, or choose wsd"),
        ({"betas": [0.9, 1.0]}, "betas: found [0.9, 1.0], expected two numbers from 0 to below 1"),
        ({"schedule": "linear"}, "schedule: found 'linear'"),
        ({"warmup_steps": 9}, "warmup_steps: unknown key; did you mean 'warmup_tokens'?"),
        ({"lr": -1}, "lr: found -1"),
    ],
)
def test_contradicting_settings_are_refused(values: dict[str, object], error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(OptimizerConfig, values, where="x.yaml")
    assert f"x.yaml: {error}" in str(caught.value)


def test_a_run_too_short_for_its_schedule_is_refused() -> None:
    config = OptimizerConfig(warmup_tokens=600, schedule="wsd", decay_tokens=500)
    with pytest.raises(ConfigError, match="warmup_tokens 600 and decay_tokens 500 together exceed the 1000 tokens"):
        lr_multiplier(config, tokens_seen=0, total_tokens=1000)
