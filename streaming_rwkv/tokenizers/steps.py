"""The steps of a tokenizer.json before and after its model: their kinds, and how much longer they may make a text.

A tokenizer may be a stranger's, and the growth of steps multiplies: twenty that double a text make a million of it. So
each step must be of a known kind, which tells its growth. Unicode's normal forms count as 1: each character is
decomposed once, and what a step inserts is counted as decomposed.
"""

from __future__ import annotations

import base64
import struct
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from streaming_rwkv.errors import panics_as_errors
from streaming_rwkv.tokenizers.base import TokenizerError, wrong_field

MOST_STEPS = 100  # of a normalizer, pre-tokenizer or decoder; those in use have up to twenty
MOST_GROWTH = 64  # of a text by all steps; those in use reach 40
MOST_INSERTED = 64  # bytes for a character in a `Precompiled`; SentencePiece's own reach 33, for U+FDFA

Step = dict[str, Any]


def check_steps(definition: dict[str, Any], *, where: str) -> None:
    """Refuse steps of unknown kinds, and those that make a text much longer, or are too many to ever end.

    Raises:
        TokenizerError: names the file and the field.
    """
    for parts in (("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)):
        growth = 1.0
        for part in parts:
            steps = steps_of(definition, part, where=where)
            if len(steps) > MOST_STEPS:
                raise TokenizerError(
                    f"{where}: {part}: has {len(steps):,} steps, expected at most {MOST_STEPS}; choose another "
                    "tokenizer"
                )
            if sum(step["type"] == "Precompiled" for step in steps) > 1:
                raise TokenizerError(f"{where}: {part}: has more than one Precompiled step; choose another tokenizer")
            inserted = _inserted(steps, where)
            growth *= prod(_PARTS[part].growth[step["type"]](step, inserted) for step in steps)
            if growth > MOST_GROWTH:
                raise TokenizerError(
                    f"{where}: {part}: it may make a text {growth:.3g} times as long, expected at most {MOST_GROWTH}; "
                    "choose another tokenizer"
                )


def steps_of(definition: dict[str, Any], part: str, *, where: str = "tokenizer.json") -> list[Step]:
    """Return the normalizers, pre-tokenizers or decoders of a definition; the members of a `Sequence` are listed.

    Raises:
        TokenizerError: one is of an unknown kind, or has a wrong field.
    """
    members, growth = _PARTS[part].members, _PARTS[part].growth
    found: list[Step] = []
    waiting = [(part, definition[part])] if definition.get(part) is not None else []
    while waiting:
        field, step = waiting.pop()
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "Sequence":
            below: Any = step.get(members)
            if not isinstance(below, list):
                raise wrong_field(where, f"{field}.{members}", below, "a list of mappings")
            waiting += reversed([(f"{field}.{members}[{at}]", member) for at, member in enumerate(below)])
        elif isinstance(kind, str) and kind in growth:
            _check_fields(step, field, where)
            found.append(step)
        else:
            expected = f'a mapping whose "type" is one of {", ".join(["Sequence", *growth])}'
            raise wrong_field(where, field, step, expected)
    return found


def _check_fields(step: Step, field: str, where: str) -> None:
    """Check what the growth of a step follows from."""
    for name in ("content", "prepend", "replacement", "suffix", "word_delimiter_token", "precompiled_charsmap"):
        if not isinstance(step.get(name, ""), str):
            raise wrong_field(where, f"{field}.{name}", step[name], "a text")
    if step["type"] == "FixedLength" and not (type(length := step.get("length", 5)) is int and length > 0):
        raise wrong_field(where, f"{field}.length", length, "a number from 1 on")
    if step["type"] in ("Replace", "Split"):
        match pattern := step.get("pattern"):
            case {"String": str(), **others} | {"Regex": str(), **others} if not others:
                pass
            case _:
                raise wrong_field(where, f"{field}.pattern", pattern, '{"String": a text} or {"Regex": a text}')


# A function for the bytes that steps like these make of an inserted text.
Inserted = Callable[[str], int]


def _inserted(steps: list[Step], where: str) -> Inserted:
    forms: list[Callable[[str], str]] = [lambda text: text, lambda text: unicodedata.normalize("NFKD", text)]
    forms += [_table_of(step, where).normalize_str for step in steps if step["type"] == "Precompiled"]
    return lambda text: max(len(form(text).encode(errors="replace")) for form in forms)


def _table_of(step: Step, where: str) -> Any:
    """Return Hugging Face's `Precompiled`, which replaces characters by those of a table."""
    from tokenizers.normalizers import Precompiled

    content = step.get("precompiled_charsmap", "")
    try:
        table = base64.b64decode(content, validate=True)
        (size,) = struct.unpack_from("<I", table)
        longest = max(map(len, table[4 + size :].split(b"\0")))
        with panics_as_errors():
            made = Precompiled(table)
            _growth_by_table(made)
    except Exception:  # noqa: BLE001 - the binding raises nothing narrower
        made, longest = None, 0
    if made is None or longest > MOST_INSERTED:
        expected = f"SentencePiece's table of characters in base64, with replacements of up to {MOST_INSERTED} bytes"
        raise wrong_field(where, "normalizer.precompiled_charsmap", content, expected)
    return made


def _growth_by_table(table: Any) -> float:
    """Measure it on the characters of one and two bytes.

    Those of three, of which Unicode's own forms make up to 33 bytes, are not counted: there is one table at most, so
    that their growth, to MOST_INSERTED bytes, is not multiplied with itself.
    """
    return max(len(table.normalize_str(char).encode()) / len(char.encode()) for char in map(chr, range(1, 0x800)))


def _growth_of_replacement(step: Step, inserted: Inserted) -> float:
    """Count an insertion before each character for an expression and for an empty text, which may match there."""
    content = inserted(step.get("content", ""))
    replaced = len(step["pattern"].get("String", "").encode(errors="replace"))
    return max(1.0, content / replaced) if replaced else 1.0 + content


def _growth_of_prefix(name: str) -> Callable[[Step, Inserted], float]:
    """Count a prefix for each character, where other steps may cut the text."""
    return lambda step, inserted: 1.0 + inserted(step.get(name) or "")


def _growth_of_bytes(step: Step, inserted: Inserted) -> float:
    """Count two bytes for each, and two for the space that may be put before it."""
    return 4.0 if step.get("add_prefix_space", False) else 2.0


def _growth_of_template(step: Step, inserted: Inserted) -> float:
    """Count the pieces that are the whole text."""
    pieces = step.get("single")
    return max(1.0, sum("Sequence" in piece for piece in pieces) if isinstance(pieces, list) else 0.0)


def _growth_by(name: str) -> Callable[[Step, Inserted], float]:
    """Count a space for each occurrence of a text, which may be empty."""
    return lambda step, inserted: 1.0 if step.get(name) else 3.0


def _constant(value: float) -> Callable[[Step, Inserted], float]:
    return lambda step, inserted: value


@dataclass(frozen=True)
class _Part:
    """A part of a tokenizer.json: the key of a `Sequence`'s members, and the growth by each other kind of step."""

    members: str
    growth: dict[str, Callable[[Step, Inserted], float]]


_SAME = _constant(1)
_PARTS = {
    "normalizer": _Part(
        "normalizers",
        dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents"), _SAME)
        | {
            "BertNormalizer": _constant(2),  # spaces around each Chinese character
            "ByteLevel": _growth_of_bytes,
            "Precompiled": lambda step, inserted: _growth_by_table(_table_of(step, "")),
            "Prepend": _growth_of_prefix("prepend"),
            "Replace": _growth_of_replacement,
        },
    ),
    "pre_tokenizer": _Part(
        "pretokenizers",
        dict.fromkeys(
            (
                "BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation", "Split",
                "UnicodeScripts", "Whitespace", "WhitespaceSplit",
            ),
            _SAME,
        )
        | {"ByteLevel": _growth_of_bytes, "Metaspace": _growth_of_prefix("replacement")},
    ),
    "post_processor": _Part(
        "processors",
        dict.fromkeys(("BertProcessing", "ByteLevel", "RobertaProcessing"), _SAME)
        | {"TemplateProcessing": _growth_of_template},
    ),
    "decoder": _Part(
        "decoders",
        dict.fromkeys(("ByteFallback", "Fuse", "Metaspace", "Strip"), _SAME)
        | {
            "BPEDecoder": _growth_by("suffix"),
            "ByteLevel": _constant(2),  # a byte that is not UTF-8 becomes U+FFFD
            "CTC": _growth_by("word_delimiter_token"),
            "Replace": _growth_of_replacement,
            "WordPiece": _constant(2),  # a space before each token
        },
    ),
}  # fmt: skip
