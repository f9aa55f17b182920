"""Numbers with units in settings."""

from __future__ import annotations

import pytest

from prep.config import PrepConfig
from streaming_rwkv.config import ConfigError, load_config
from streaming_rwkv.quantities import read_bytes, read_count
from streaming_rwkv.train.config import RunConfig


@pytest.mark.parametrize(
    ("text", "number"),
    [("32k", 32_000), ("1M", 10**6), ("1.5 m", 1_500_000), ("2B", 2 * 10**9), ("1_000", 1000), ("7", 7), ("-3", -3)],
)
def test_counts_are_in_powers_of_1000(text, number):
    assert read_count(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("200gb", 200 * 2**30), ("72MiB", 72 * 2**20), ("1k", 1024), ("0.5 TB", 2**39), ("12", 12), ("12b", 12)],
)
def test_sizes_are_in_powers_of_1024(text, number):
    assert read_bytes(text) == number


@pytest.mark.parametrize("text", ["32kb", "k", "1.5", "", "ten", "1.0001k", "1e3"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError, match=r"^found .*; expected a whole number, or one with k, M, G"):
        read_count(text)


@pytest.mark.parametrize("text", ["5 apples", "ib", "1.5", "lots", "1ib", "2pb"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"^found .*; expected a number of bytes, or one with kb, mb, gb or tb"):
        read_bytes(text)


def test_settings_take_units_in_the_file_and_on_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "save_folder: run\nmodel: {}\n"
        "data: {path: data, batch_tokens: 32k, cache_limit: 200gb, stages: [{tokens: 1.5M}]}\n"
    )
    config = load_config(RunConfig, tmp_path / "run.yaml", overrides=["optimizer.warmup_tokens=20k"])
    assert (config.data.batch_tokens, config.data.cache_limit) == (32_000, 200 << 30)
    assert (config.data.stages[0].tokens, config.optimizer.warmup_tokens) == (1_500_000, 20_000)
    (tmp_path / "prep.yaml").write_text("out: o\ntokenizer: t\nsources: {a: {paths: a}}\nshard_bytes: 16mb\n")
    recipe = load_config(PrepConfig, tmp_path / "prep.yaml", overrides=["window_tokens=2M"])
    assert (recipe.shard_bytes, recipe.window_tokens) == (16 << 20, 2_000_000)
    for key, wrong in (("data.batch_tokens", "32kb"), ("data.batch_tokens", "-1k"), ("data.cache_limit", "lots")):
        with pytest.raises(ConfigError) as caught:
            load_config(RunConfig, tmp_path / "run.yaml", overrides=[f"{key}={wrong}"])
        assert str(caught.value).startswith(f"command line: {key}: found '{wrong}'; ")
        assert "\n" not in str(caught.value)
