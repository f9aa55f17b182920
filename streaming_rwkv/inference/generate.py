"""Text from a model: `python -m streaming_rwkv.generate CHECKPOINT "prompt"` writes as it generates."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator

import torch

from streaming_rwkv.config import UserError
from streaming_rwkv.console import print_error, shown, tolerate_any_encoding
from streaming_rwkv.inference.loading import find_device, find_tokenizer
from streaming_rwkv.inference.sampling import GenerationError, generate
from streaming_rwkv.model.weights import load_model
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from streaming_rwkv.train.checkpoints.restore import local_checkpoint


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m streaming_rwkv.generate`, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m streaming_rwkv.generate", description="Continue a text with a trained model."
    )
    parser.add_argument("checkpoint", help="a .pth, a Hugging Face folder, a training run or checkpoint, also on s3://")
    parser.add_argument("prompt", nargs="?", default="", help="beginning of the text (default: empty)")
    parser.add_argument("--tokenizer", help="default: the tokenizer stored with the checkpoint")
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="largest number of tokens to generate (default: 256)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1.0)")
    parser.add_argument("--top-p", type=float, default=0.9, help="probability mass to sample from (default: 0.9)")
    parser.add_argument("--seed", type=int, help="random seed: the same seed repeats a text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, …")
    options = parser.parse_args(arguments)
    tolerate_any_encoding()
    try:
        return run(options)
    except UserError as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports an error at exit
        return 141


def run(options: argparse.Namespace) -> int:
    """Print a continuation of the prompt, and return the exit status."""
    _check(options)
    device = find_device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with local_checkpoint(options.checkpoint) as checkpoint:
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else find_tokenizer(checkpoint)
        if tokenizer is None:
            raise GenerationError(
                f"{options.checkpoint}: no tokenizer is stored with it; name one with --tokenizer: a folder, a "
                "tokenizer.json, or rwkv-world for BlinkDL's World models"
            )
        model = load_model(checkpoint, dtype=dtype).to(device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise GenerationError(
            f"{options.checkpoint}: the model has {model.config.vocab_size} tokens, the tokenizer "
            f"{tokenizer.name!r} has {tokenizer.vocab_size}; name the one it was trained with by --tokenizer"
        )
    generator = torch.Generator()
    generator.seed() if options.seed is None else generator.manual_seed(options.seed)
    sampled: list[int] = []

    def counted() -> Iterator[int]:
        for token in generate(
            model,
            [tokenizer.bos_id, *tokenizer.encode(options.prompt).tolist()],
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            vocab_size=tokenizer.vocab_size,
            stop={tokenizer.eos_id},
            generator=generator,
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
    print(f"{len(sampled)} tokens in {seconds:.1f} s{rate}", file=sys.stderr)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Check the options before the model is read."""
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        byte = ord(options.prompt[error.start]) & 0xFF  # Python keeps an undecodable byte as a surrogate
        raise GenerationError(
            f"prompt: byte 0x{byte:02x} at character {error.start} is not UTF-8; write the prompt in UTF-8"
        ) from None
    if options.max_tokens < 0:
        raise GenerationError(f"--max-tokens {options.max_tokens}: expected a whole number, at least 0")
    if options.seed is not None and not -(1 << 63) <= options.seed < 1 << 64:
        raise GenerationError(f"--seed {options.seed}: expected a whole number of 64 bits, such as 17")


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of `tokens` in parts, each as soon as no later token can change it."""
    return tokenizer.decode_stream(tokens)


if __name__ == "__main__":
    sys.exit(main())
