"""Data sets that `prep` built, with documents in every bucket: what the YAMLs of this repository ask for, but small."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from prep.build import build
from prep.config import PrepConfig
from streaming_rwkv.config import validate

EDGES = [256, 512, 768, 1024, 1280, 1536, 1792, 2048]
BuildDataSet = Callable[..., Path]


def save_byte_tokenizer(folder: Path) -> Path:
    """A token for each byte, and one that begins and ends a document: n ASCII characters make n + 1 inputs."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<end>", *letters])}, []))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


def write_corpus(file: Path, *, documents_per_bucket: int, seed: int) -> None:
    """Texts of a few words over and over, so that a model can learn something of them."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 7))) for _ in range(30)]
    file.parent.mkdir(parents=True)
    with open(file, "w") as lines:
        for edge in EDGES * documents_per_bucket:
            length = int(rng.integers(edge - 200, edge))
            lines.write(json.dumps({"text": " ".join(rng.choice(words, length // 3))[:length]}) + "\n")


@pytest.fixture(scope="session")
def build_data_set() -> BuildDataSet:
    """`build_data_set(folder, sources=["web"], pack_tokens=4096)`: built by `prep` in this process."""

    def make(folder: Path, *, sources: Sequence[str], pack_tokens: int, documents_per_bucket: int = 5) -> Path:
        for number, source in enumerate(sources):
            file = folder / "corpus" / source / "documents.jsonl"
            write_corpus(file, documents_per_bucket=documents_per_bucket, seed=number)
        values = {
            "out": str(folder / "shards"),
            "tokenizer": str(save_byte_tokenizer(folder / "tokenizer")),
            "sources": {source: {"paths": str(folder / "corpus" / source)} for source in sources},
            "pack_tokens": pack_tokens,
            "validation": 0.2,
            "workers": 1,
        }
        build(validate(PrepConfig, values, where="test"))
        return folder / "shards"

    return make
