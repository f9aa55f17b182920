"""Text from a model: `python -m streaming_rwkv.generate CHECKPOINT "prompt"` writes as it goes.

The model reads each token once and carries a state, so a token costs the same however long the text has become.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from streaming_rwkv.config import UserError
from streaming_rwkv.console import print_error, shown, tolerate_any_encoding
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.weights import load_model
from streaming_rwkv.tokenizer import WORLD_VOCABULARY, Tokenizer, load_tokenizer
from streaming_rwkv.train.checkpoints.restore import local_checkpoint


class GenerationError(UserError):
    """A prompt, a tokenizer or a setting that generation cannot use."""


@torch.no_grad()  # as a decorator it does not reach the code that consumes the iterator
def generate(
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
    """The tokens that go on after `tokens`, one by one as they are drawn.

    Args:
        model: on any device. Sharded by FSDP2, `register_fsdp_forward_method(model, "step")` is needed, and every
            rank generates the same.
        tokens: the prompt, at least one; a document begins with the tokenizer's bos.
        max_tokens: how many at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw from the fewest tokens whose probabilities together reach this share.
        vocab_size: the tokenizer's, where the model's is larger: no id from there on is drawn.
        stop: tokens that end the text; the one that did is not given.
        generator: on the CPU; makes the choices repeatable.
    Raises:
        GenerationError: an empty prompt, a setting out of its range, or a model that gives logits which are not finite.
    """
    if len(tokens) == 0:
        raise GenerationError("prompt: is empty; begin with the tokenizer's bos token")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise GenerationError(f"temperature {temperature}, top_p {top_p}: expected temperature ≥ 0 and 0 < top_p ≤ 1")
    if max_tokens < 0:
        raise GenerationError(f"max_tokens {max_tokens}: expected a whole number, at least 0")
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
    """Draw an id from logits (V,) float32."""
    if not logits.isfinite().all():
        raise GenerationError(
            "the model gives logits that are not finite: its training has diverged; take an older one"
        )
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=0)  # from 0 down: no temperature overflows
    if top_p < 1:
        ordered, ids = probabilities.sort(descending=True)
        # A token is kept if those before it do not suffice; the first always is.
        ordered = ordered.where(ordered.cumsum(0) - ordered < top_p, 0)
        return int(ids[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens`, in parts, each as soon as no later token can change it."""
    return tokenizer.decode_stream(tokens)


def find_tokenizer(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer that lies with a checkpoint: in its folder, or in `tokenizer/` there or up to two folders above."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    candidates = [folder, *(place / "tokenizer" for place in (folder, *folder.resolve().parents[:2]))]
    names = ("tokenizer.json", "tokenizer.model", WORLD_VOCABULARY)
    for candidate in candidates:
        if any((candidate / name).is_file() for name in names):
            return load_tokenizer(candidate)
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m streaming_rwkv.generate", description="Go on with a text.")
    parser.add_argument("checkpoint", help="a .pth, a Hugging Face folder, a training run or checkpoint, also on s3://")
    parser.add_argument("prompt", nargs="?", default="", help="what the text begins with (default: nothing)")
    parser.add_argument("--tokenizer", help="default: the one that lies with the checkpoint")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, help="repeats a text")
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
    except BrokenPipeError:  # whoever read it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        return 141


def find_device(name: str) -> torch.device:
    """The device that an option names.

    Raises:
        GenerationError: it is not there.
    """
    try:
        device = torch.device("cuda" if name == "gpu" else name)  # as a run's settings have it
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion: a torch without CUDA
        reason = str(error).strip().partition("\n")[0]
        raise GenerationError(f"--device {name}: cannot be used here ({reason}); take cpu") from None
    return device


def _check(options: argparse.Namespace) -> None:
    """What the model is not needed for, before it is read."""
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        byte = ord(options.prompt[error.start]) & 0xFF  # as Python keeps a byte of the command line that is no UTF-8
        raise GenerationError(
            f"prompt: byte 0x{byte:02x} at character {error.start} is not UTF-8; write the prompt in UTF-8"
        ) from None
    if options.max_tokens < 0:
        raise GenerationError(f"--max-tokens {options.max_tokens}: expected a whole number, at least 0")
    if options.seed is not None and not -(1 << 63) <= options.seed < 1 << 64:
        raise GenerationError(f"--seed {options.seed}: expected a whole number of 64 bits, such as 17")


def run(options: argparse.Namespace) -> int:
    _check(options)
    device = find_device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with local_checkpoint(options.checkpoint) as checkpoint:
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else find_tokenizer(checkpoint)
        if tokenizer is None:
            raise GenerationError(
                f"{options.checkpoint}: no tokenizer lies with it; give one with --tokenizer: a folder, a "
                "tokenizer.json, or rwkv-world for BlinkDL's World models"
            )
        model = load_model(checkpoint, dtype=dtype).to(device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise GenerationError(
            f"{options.checkpoint}: the model knows {model.config.vocab_size} tokens, the tokenizer "
            f"{tokenizer.name!r} has {tokenizer.vocab_size}; give the one it was trained with by --tokenizer"
        )
    generator = torch.Generator()
    generator.seed() if options.seed is None else generator.manual_seed(options.seed)
    drawn: list[int] = []

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
            drawn.append(token)
            yield token

    start = time.monotonic()
    on_terminal = sys.stdout.isatty()  # a file or another program gets the text as it is
    for part in stream_text(tokenizer, counted()):
        print(shown(part, lines=True) if on_terminal else part, end="", flush=True)
    seconds = time.monotonic() - start
    print(flush=True)
    print(f"{len(drawn)} tokens in {seconds:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
