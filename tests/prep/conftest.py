"""Fixtures: a small tokenizer, configurations, and corpora that each test writes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prep.config import PrepConfig
from streaming_rwkv.config import validate

END = "<|endoftext|>"
_TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "def f(x):\n    return x + 1\n",
    "床前明月光，疑是地上霜。",
] * 20


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a byte-level BPE of 320 tokens; id 0 is bos and eos."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(_TEXTS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


@pytest.fixture
def config(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., PrepConfig]:
    """Return a function that makes a configuration: source 'corpus' in tmp_path, one worker, no validation split."""

    def make(**values: Any) -> PrepConfig:
        values = {
            "out": str(tmp_path / "out"),
            "tokenizer": str(tokenizer_folder),
            "sources": {"corpus": {"paths": str(tmp_path / "corpus")}},
            "validation": 0.0,
            "workers": 1,
            **values,
        }
        return validate(PrepConfig, values, where="test")

    return make


def write_lines(file: Path, texts: Iterable[str], **more: Any) -> Path:
    """Write {"text": …} lines to a file, compressed if its name ends with .gz."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": text, **more}, ensure_ascii=False) + "\n" for text in texts).encode()
    file.write_bytes(gzip.compress(content) if file.name.endswith(".gz") else content)
    return file


@pytest.fixture(name="write_lines")
def _write_lines() -> Callable[..., Path]:
    return write_lines
