"""A byte-level BPE and models whose every weight matters, for what other programs make of exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer


def bpe(folder: Path, *, vocab_size: int = 270, texts: Sequence[str] = ()) -> Tokenizer:
    """Train a tokenizer on some words and `texts`, and save it in `folder`."""
    words = tokenizers.Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(["the cat and the hat and the bat", *texts] * 3, trainer)
    folder.mkdir()
    words.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, bos_token="<end>", eos_token="<end>")


def random_model(**shape: int) -> RWKV7:
    """Return a model with noise on every weight: at the initialization many are 0."""
    model = RWKV7(RWKV7Config(**{"vocab_size": 270, "hidden_size": 128, "num_layers": 3, **shape}))
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
