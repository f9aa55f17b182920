"""Checks of what is asked of a model: prompt, seed and number of tokens. They need no torch."""

from __future__ import annotations

import sys

from streaming_rwkv.errors import UserError


class GenerationError(UserError):
    """A prompt, a tokenizer, a model or a setting that cannot be used for generation."""


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that cannot be encoded.

    Raises:
        GenerationError: it is no text, or has a surrogate, as which Python keeps a byte that is not UTF-8.
    """
    if not isinstance(prompt, str):
        raise GenerationError(f"prompt: found {type(prompt).__name__}, expected text, a str")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        byte = ord(prompt[error.start]) & 0xFF
        encoding = sys.getfilesystemencoding()  # of arguments, as the locale has it
        remedy = "write the prompt in UTF-8" if encoding == "utf-8" else "set LC_ALL=C.UTF-8"
        raise GenerationError(
            f"prompt: byte 0x{byte:02x} at character {error.start} is not {encoding.upper()}; {remedy}"
        ) from None


def check_seed(seed: int | None, *, name: str = "seed") -> None:
    """Refuse a seed that torch's generators do not take.

    Raises:
        GenerationError: it has more than 64 bits.
    """
    if seed is not None and not (isinstance(seed, int) and -(1 << 63) <= seed < 1 << 64):
        raise GenerationError(f"{name} {seed!r}: expected a whole number of 64 bits, such as 17")


def check_max_tokens(max_tokens: int, *, name: str = "max_tokens") -> None:
    """Refuse a negative number of tokens.

    Raises:
        GenerationError: it is below 0.
    """
    if not isinstance(max_tokens, int) or max_tokens < 0:
        raise GenerationError(f"{name} {max_tokens!r}: expected a whole number, at least 0")
