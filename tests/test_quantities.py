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


ABSURD = [
    *("data.cycles=1001", "data.workers=1000", "data.fetch_ahead=1_000_000_000", "data.timeout_seconds=1e300"),
    *("data.stages.0.tokens=1000000T", "data.batch_tokens=1000000T", "optimizer.warmup_tokens=1000000T"),
    *("data.cache_limit=10000000TB", "model.vocab_size=10000000000000", "checkpoint.interval_steps=10000000000000"),
]


def test_absurd_sizes_of_a_run_are_refused_with_their_bound(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("save_folder: run\nmodel: {}\ndata: {path: data, batch_tokens: 32k, stages: [{tokens: 1}]}\n")
    for override in ABSURD:
        with pytest.raises(ConfigError, match=r"^command line: .*; Input should be less than or equal to \d+$"):
            load_config(RunConfig, file, overrides=[override])
    with pytest.raises(ConfigError, match=r"stages\.0\.passes: found 1e\+300; Input should be less than or equal to "):
        load_config(RunConfig, file, overrides=["data.stages=[{passes: 1e300}]"])


def test_absurd_sizes_of_a_recipe_are_refused_with_their_bound(tmp_path):
    file = tmp_path / "prep.yaml"
    file.write_text("out: o\ntokenizer: t\nsources: {a: {paths: a}}\n")
    for override in ("workers=100000", "window_tokens=1000000T", "unit_bytes=10000000TB"):
        with pytest.raises(ConfigError, match=r"^command line: .*; Input should be less than or equal to \d+$"):
            load_config(PrepConfig, file, overrides=[override])
