"""Sampling of tokens from a model.

The model reads each token once and carries a state, so a token costs the same however long the text has become.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from streaming_rwkv.inference.generation_checks import GenerationError, check_max_tokens
from streaming_rwkv.model.rwkv7 import RWKV7

_LOWEST_TEMPERATURE = 1e-30  # far enough from where float32 ends


@torch.no_grad()  # as a decorator it does not reach the code that consumes the iterator
def generate_tokens(
    model: RWKV7,
    tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    vocab_size: int | None = None,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the tokens that continue `tokens`, each as soon as it is sampled.

    Args:
        model: on any device. A model sharded by FSDP2 needs `register_fsdp_forward_method(model, "step")`, and every
            rank must generate the same tokens.
        tokens: the prompt, at least one token; a document begins with the tokenizer's bos.
        max_tokens: the largest number of tokens to generate.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample from the fewest tokens whose probabilities add up to at least this share.
        vocab_size: the tokenizer's, if the model's is larger: ids from there on are never sampled.
        stop: tokens that end the text; the one that ended it is not yielded.
        generator: on the CPU; makes the choices repeatable.
    Raises:
        GenerationError: the prompt is empty, a setting is out of range, or the model's logits are not finite.
    """
    if len(tokens) == 0:
        raise GenerationError("prompt: is empty; begin with the tokenizer's bos token")
    is_number = all(isinstance(value, int | float) for value in (temperature, top_p))
    if not is_number or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise GenerationError(
            f"temperature {temperature!r}, top_p {top_p!r}: expected temperature ≥ 0 and 0 < top_p ≤ 1"
        )
    check_max_tokens(max_tokens)
    device = model.emb.weight.device
    unread, state = list(tokens), None
    for _ in range(max_tokens):
        logits, state = model.step(torch.tensor([unread], device=device), state)
        token = choose(logits[0, :vocab_size].float().cpu(), temperature=temperature, top_p=top_p, generator=generator)
        if token in stop:
            return
        yield token
        unread = [token]


def choose(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator | None = None) -> int:
    """Sample an id from logits (V,) float32.

    Raises:
        GenerationError: the logits are not finite.
    """
    if not logits.isfinite().all():
        raise GenerationError("the model's logits are not finite: its training has diverged; use an older checkpoint")
    if temperature == 0:
        return int(logits.argmax())
    temperature = max(temperature, _LOWEST_TEMPERATURE)  # where only the likeliest token is left, whatever the logits
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=0)  # at most 0: no temperature overflows
    if top_p < 1:
        ordered, ids = probabilities.sort(descending=True)
        # Keep a token if the tokens before it do not reach top_p; the first is always kept.
        kept = ordered.cumsum(0) - ordered < top_p
        kept[0] = True  # float32 takes the smallest top_p for 0
        ordered = ordered.where(kept, 0)
        return int(ids[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
