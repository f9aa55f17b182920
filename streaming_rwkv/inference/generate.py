"""Text from a model: `streaming-rwkv generate CHECKPOINT "prompt"` writes as it generates."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator

import torch

from streaming_rwkv.console import shown, styled
from streaming_rwkv.inference.generation_checks import GenerationError
from streaming_rwkv.inference.loading import find_device, find_tokenizer
from streaming_rwkv.inference.text import continue_prompt
from streaming_rwkv.model.weights import read_model
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from streaming_rwkv.train.checkpoints.restore import local_checkpoint


def run(options: argparse.Namespace) -> int:
    """Print a continuation of the prompt, and return the exit status."""
    device = find_device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with local_checkpoint(options.checkpoint) as checkpoint:
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else find_tokenizer(checkpoint)
        if tokenizer is None:
            read_model(checkpoint)  # tells if it is no checkpoint at all
            raise GenerationError(
                f"{options.checkpoint}: no tokenizer is stored with it; name one with --tokenizer: a folder, a "
                "tokenizer.json, or rwkv-world for BlinkDL's World models"
            )
        model = read_model(checkpoint, dtype=dtype).to(device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise GenerationError(
            f"{options.checkpoint}: the model has {model.config.vocab_size} tokens, the tokenizer "
            f"{tokenizer.name!r} has {tokenizer.vocab_size}; name the one it was trained with by --tokenizer"
        )
    sampled: list[int] = []

    def counted() -> Iterator[int]:
        for token in continue_prompt(
            model,
            tokenizer,
            options.prompt,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        ):
            sampled.append(token)
            yield token

    start = time.monotonic()
    on_terminal = sys.stdout.isatty()  # a file or another program gets the text unchanged
    for part in stream_text(tokenizer, counted()):
        print(shown(part, lines=True) if on_terminal else part, end="", flush=True)
    seconds = time.monotonic() - start
    print(flush=True)
    rate = f", {len(sampled) / seconds:.1f} tokens/s" if sampled and seconds > 0 else ""
    print(styled(f"{len(sampled)} tokens in {seconds:.1f} s{rate}", "quiet", stream=sys.stderr), file=sys.stderr)
    return 0


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of `tokens` in parts, each as soon as no later token can change it."""
    return tokenizer.decode_stream(tokens)
