"""Packs and a tokenizer for small data sets that are written without `prep build`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from streaming_rwkv.shards import TokenizerRecord
from streaming_rwkv.tokenizer import load_tokenizer

VOCAB_SIZE = 97
PACK_TOKENS = 64


def pack_of(stream: int, number: int, *, lower: int, upper: int) -> dict[str, np.ndarray]:
    """A pack of a few documents whose tokens count upwards after bos, so that a model can learn them."""
    rng = np.random.default_rng([stream, number])
    lengths: list[int] = []
    while True:
        length = int(rng.integers(max(lower, 2), upper + 1))
        if sum(lengths) + length > PACK_TOKENS:
            break
        lengths.append(length)
    documents = [(rng.integers(1, VOCAB_SIZE) + np.arange(length + 1)) % VOCAB_SIZE for length in lengths]
    for document in documents:
        document[0] = 0  # bos
    return {
        "tokens": np.concatenate(documents).astype(np.uint16),
        "lengths": np.array([length + 1 for length in lengths], np.uint32),
        "starts": np.zeros(len(lengths), np.uint32),
        "bytes": np.array([2 * length for length in lengths], np.uint32),
        "keys": rng.integers(0, 1 << 62, len(lengths)).astype(np.uint64),
    }


def save_tokenizer(folder: Path) -> TokenizerRecord:
    """Tokens w0 … w96 for the ids 0 … 96; w0 begins and ends a document."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.add_special_tokens(["w0"])
    words.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder, bos_token="w0", eos_token="w0")
    tokenizer.save(folder)
    return tokenizer.record()
