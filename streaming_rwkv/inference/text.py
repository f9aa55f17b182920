"""Continuations of a text by a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from streaming_rwkv.inference.generation_checks import GenerationError, check_prompt, check_seed
from streaming_rwkv.inference.sampling import generate_tokens
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.tokenizer import Tokenizer


def generate(
    model: RWKV7,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: int | None = None,
) -> str:
    """Return the text with which a model continues a prompt, without the prompt.

        model = load_model("runs/mine")
        print(generate(model, load_tokenizer("runs/mine/tokenizer"), "Once upon a time", seed=1))

    Args:
        model: on any device.
        tokenizer: the one that the model was trained with.
        prompt: the beginning of a document.
        max_tokens: the largest number of tokens to generate; a document that ends before is returned as it is.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample from the fewest tokens whose probabilities add up to at least this share.
        seed: makes the text repeatable, on one machine.
    Raises:
        GenerationError: a tokenizer with more ids than the model, a setting that is out of range, a prompt that is not
            Unicode text, or logits that are not finite.
    """
    if not isinstance(getattr(model, "config", None), RWKV7Config):
        raise GenerationError(f"model: found a {type(model).__name__}, expected an RWKV7, such as load_model returns")
    if not isinstance(tokenizer, Tokenizer):
        raise GenerationError(f"tokenizer: found {tokenizer!r}, expected one, such as load_tokenizer({tokenizer!r})")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise GenerationError(
            f"generate: the model has {model.config.vocab_size} tokens, the tokenizer {tokenizer.name!r} has "
            f"{tokenizer.vocab_size}; give the tokenizer that the model was trained with"
        )
    tokens = continue_prompt(
        model, tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    return tokenizer.decode(list(tokens))


def continue_prompt(
    model: RWKV7,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> Iterator[int]:
    """Return the tokens that continue a prompt, up to the end of the document; see `generate`."""
    check_prompt(prompt)
    check_seed(seed)
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generate_tokens(
        model,
        [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()],
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        vocab_size=tokenizer.vocab_size,
        stop={tokenizer.eos_id},
        generator=generator,
    )
