"""A manifest whose numbers contradict each other is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streaming_rwkv.config import ConfigError
from streaming_rwkv.data.mixture import StageConfig, make_plan
from streaming_rwkv.shards import DataError, parse_manifest


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Path]) -> str:
    folder = write_data_set(tmp_path_factory.mktemp("set") / "data", {("web", 1, 16): 9, ("code", 1, 16): 4})
    return (folder / "manifest.json").read_text()


def set_in(values: Any, path: str, value: Any) -> None:
    *folders, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in folders:
        values = values[part]
    values[last] = value


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("streams.0.packs", 10, "found 10 packs, but its shards have 9 in all"),
        ("streams.0.packs", 8, "found 8 packs, but its shards have 9 in all"),
        ("streams.0.packs", -3, "greater than 0"),
        ("streams.0.targets", 0, "greater than 0"),
        ("streams.0.targets", 1 << 70, r"packs of at most 64 inputs"),
        ("streams.0.documents", -1, "greater than or equal to 0"),
        ("streams.0.lower", 17, "lower is 17, above upper 16"),
        ("streams.1.source", "web", "found train/web/1-16 twice"),
        ("streams.0.shards.0.raw_bytes", 0, "greater than 0"),
        ("edges", [16, 8], "expected rising lengths"),
        ("edges", [], "at least 1 item"),
        ("pack_tokens", 0, "greater than 0"),
        ("tokenizer.bos_id", -1, "greater than or equal to 0"),
        ("tokenizer.eos_id", 97, "eos_id: found 97, but vocab_size is 97"),
        ("config", {"x": "\ud800"}, "not valid JSON"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(content: str, path: str, value: Any, text: str) -> None:
    values = json.loads(content)
    set_in(values, path, value)
    with pytest.raises(DataError, match=text):
        parse_manifest(json.dumps(values).encode(), where="here")


def test_a_manifest_nested_too_deeply_is_refused() -> None:
    with pytest.raises(DataError, match=r"^here: not valid JSON"):
        parse_manifest(b"[" * 100_000, where="here")


def test_a_data_set_without_training_packs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no packs to train on.*smaller `validation`"):
        make_plan([StageConfig(passes=1)], [], batch_packs=1, seed=0, block_shards=1)
