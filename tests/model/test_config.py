"""Sizes, ranks and costs, against BlinkDL's and the RWKV-7 paper's numbers."""

from __future__ import annotations

import pytest
import torch

from streaming_rwkv.config import ConfigError, validate
from streaming_rwkv.model.flops import flops_per_token, flops_per_token_6n, parameter_count
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config


def preset(name: str, vocab_size: int = 65536) -> RWKV7Config:
    return RWKV7Config.model_validate({"preset": name, "vocab_size": vocab_size})


@pytest.mark.parametrize(
    ("name", "parameters"),
    # RWKV-7 paper (arXiv 2503.14456), the World-3 models
    [("0.1B", 191_034_624), ("0.4B", 450_767_872), ("1.5B", 1_527_404_544), ("2.9B", 2_947_735_040)],
)
def test_presets_have_the_released_sizes(name: str, parameters: int) -> None:
    assert parameter_count(preset(name)) == parameters


@pytest.mark.parametrize("name", ["0.1B", "0.4B", "1.5B", "2.9B"])
def test_the_count_is_that_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = RWKV7(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(preset(name))


def test_the_files_of_the_smallest_model_hold_layer_0s_value_residual_too() -> None:
    config = preset("0.1B")
    unused = 768 + 2 * 768 * config.v_rank
    assert parameter_count(config) + unused == 191_084_544


@pytest.mark.parametrize(
    ("hidden_size", "ranks"),
    # max(32, round(m·√C/32)·32), m = 2.5, 2.5, 1.7, 5; Python rounds 2.5 to 2
    [
        (128, (32, 32, 32, 64)),
        (768, (64, 64, 32, 128)),
        (1024, (64, 64, 64, 160)),
        (2048, (128, 128, 64, 224)),
        (4096, (160, 160, 96, 320)),
    ],
)
def test_default_ranks_follow_the_reference_trainer(hidden_size: int, ranks: tuple[int, int, int, int]) -> None:
    config = RWKV7Config(vocab_size=256, hidden_size=hidden_size, num_layers=2)
    assert (config.decay_rank, config.a_rank, config.v_rank, config.gate_rank) == ranks
    assert config.ffn_size == 4 * hidden_size


def test_flops_of_one_layer_by_hand() -> None:
    config = RWKV7Config(
        vocab_size=10, hidden_size=64, num_layers=1, decay_rank=1, a_rank=2, v_rank=99, gate_rank=3, ffn_size=256
    )
    # 12·64² = 49152 weights of projections, 2·64·(1 + 2 + 3) = 768 of LoRAs (none for v in layer 0), 640 of the head
    assert flops_per_token(config) == 6 * (49152 + 768 + 640) + 27 * 64 * 64
    assert flops_per_token_6n(config) == 6 * parameter_count(config)


def test_flops_of_the_smallest_model() -> None:
    # 6·[12·12·768² + 2·768·(12·(64 + 64 + 128) + 11·32) + 768·65536] + 27·64·768·12
    assert flops_per_token(preset("0.1B")) == 859_078_656


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (
            {"preset": "0.4B", "vocab_size": 9, "hidden_size": 768},
            "x.yaml: hidden_size: found 768, but preset '0.4B' has 1024; leave it out, or set preset to null and give "
            "hidden_size and num_layers",
        ),
        ({"preset": "7B", "vocab_size": 9}, "preset: found '7B'"),
        (
            {"vocab_size": 9, "hidden_size": 100, "num_layers": 2},
            "x.yaml: hidden_size: found 100, which is no multiple of head_size 64; the nearest is 128",
        ),
        ({"vocab_size": 9, "num_layers": 2}, "x.yaml: hidden_size: required, but not given"),
        ({"vocab_size": 9, "hidden_size": -64, "num_layers": 2}, "x.yaml: hidden_size: found -64"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(values: dict[str, object], error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(RWKV7Config, values, where="x.yaml")
    assert error in str(caught.value)


def test_a_configuration_survives_being_written_down() -> None:
    config = preset("0.1B")
    assert validate(RWKV7Config, config.model_dump(), where="x.yaml") == config
