"""Tokenizers that a `tokenizer.json` defines: fast ids through fastokens, and Hugging Face's own as the reference."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from streaming_rwkv.errors import LibraryPanic, panics_as_errors
from streaming_rwkv.filesystem import write_atomically
from streaming_rwkv.limits import limit_of
from streaming_rwkv.tokenizers.base import (
    TextError,
    TokenBatch,
    Tokenizer,
    TokenizerError,
    decode_bytes,
    first_line,
)
from streaming_rwkv.tokenizers.definition import (
    byte_level_bytes,
    examples,
    marked_bytes,
    merges_as_strings,
    missing_bytes,
    vocabulary_of,
    with_special,
    without_dropout,
)
from streaming_rwkv.tokenizers.steps import steps_of
from streaming_rwkv.tokenizers.time_limit import TimeIsOver, check_reading_ends, within_limit
from streaming_rwkv.version import PROGRAM

logger = logging.getLogger(__name__)

_CHARACTERS_OF_TOKEN = 16  # more than the average of any text
HUB_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer defined by a `tokenizer.json`. Ids come from fastokens if it supports the definition."""

    kind = "huggingface"

    def __init__(
        self, definition: dict[str, Any], *, name: str, bos_token: str | None, eos_token: str | None, where: str
    ) -> None:
        """Create from `definition`, the parsed tokenizer.json; errors name it `where`."""
        self.name = name
        self._where = where
        ids = vocabulary_of(definition)
        if not ids:
            raise TokenizerError(f"{where}: its vocabulary is empty")
        if eos_token is None:
            raise TokenizerError(
                f"{where}: its files name no end-of-text token, with which every document ends; set `eos_token:` "
                f'to one of {examples(definition)}, or add a tokenizer_config.json with an "eos_token"'
            )
        bos_token = eos_token if bos_token is None else bos_token
        for key, token in (("eos_token", eos_token), ("bos_token", bos_token)):
            if token not in ids:
                raise TokenizerError(f"{where}: {key} {token!r} is not in its vocabulary; try {examples(definition)}")
        self.bos_id, self.eos_id = ids[bos_token], ids[eos_token]
        self.vocab_size = max(ids.values()) + 1
        self._bos_token, self._eos_token = bos_token, eos_token
        self._definition = definition | {
            "model": definition["model"]
            | merges_as_strings(definition["model"])
            | without_dropout(definition["model"]),
            "truncation": None,
            "padding": None,
            "added_tokens": with_special(definition.get("added_tokens", []), ids, (bos_token, eos_token)),
        }
        content = self._content  # raises if the definition cannot be written
        if _searches_added_tokens(self._definition):
            try:
                check_reading_ends(content)
            except TimeIsOver as error:
                raise TokenizerError(f"{where}: {error}; choose another tokenizer") from None

    @cached_property
    def _content(self) -> bytes:
        try:
            return orjson.dumps(self._definition, option=orjson.OPT_SORT_KEYS)
        except TypeError as error:
            raise TokenizerError(
                f"{self._where}: cannot be written again ({error}); choose a tokenizer whose lists are not as deep"
            ) from None

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self._content + f"\n{self.bos_id} {self.eos_id}".encode()).hexdigest()

    @cached_property
    def _fast(self) -> Any | None:
        import fastokens

        try:
            with panics_as_errors():
                return fastokens.Tokenizer.from_json_str(self._content.decode())
        except (ValueError, LibraryPanic) as error:
            logger.warning(
                "tokenizer %s: fastokens does not support it (%s); using Hugging Face's own, some twenty times slower",
                self.name,
                first_line(error),
            )
            return None

    @cached_property
    def _reference(self) -> Any:
        import tokenizers

        try:
            with panics_as_errors():
                reference = tokenizers.Tokenizer.from_str(self._content.decode())
        except Exception as error:  # noqa: BLE001  # the binding raises nothing narrower
            raise TokenizerError(
                f"{self._where}: Hugging Face tokenizers {tokenizers.__version__} cannot read it ({first_line(error)})"
            ) from None
        reference.encode_special_tokens = True
        return reference

    @cached_property
    def _missing_bytes(self) -> frozenset[int]:
        missing = missing_bytes(self._definition)
        if missing:
            logger.warning(
                "tokenizer %s: its byte-level vocabulary has no token for %d bytes (%s); texts with one of them "
                "are rejected. Train a tokenizer with all bytes: `%s train-tokenizer`, or "
                "BpeTrainer(initial_alphabet=ByteLevel.alphabet())",
                self.name,
                len(missing),
                ", ".join(f"0x{byte:02x}" for byte in sorted(missing)[:4]) + ("…" if len(missing) > 4 else ""),
                PROGRAM,
            )
        return missing

    def load(self) -> None:
        self._missing_bytes  # noqa: B018
        (None if self._fast_is_wrong else self._fast) or self._reference  # noqa: B018

    def encode_batch(self, texts: Sequence[str]) -> TokenBatch:
        if self._fast_is_wrong or self._fast is None:
            return TokenBatch.of(self.encode_reference(texts))
        fast = self._fast
        with self._text_errors(texts):
            ids, offsets = within_limit(
                lambda: fast.encode_batch_flat(list(texts), False, True), characters=sum(map(len, texts))
            )
        return TokenBatch(ids=np.frombuffer(ids, np.uint32), offsets=np.frombuffer(offsets, np.int64))

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Encode one text with the reference: speed does not matter, and nothing would notice differing fast ids."""
        return self.encode_reference([text])[0]

    def encode_reference(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        reference = self._reference
        with self._text_errors(texts):
            encodings = within_limit(
                lambda: reference.encode_batch_fast(list(texts), add_special_tokens=False),
                characters=sum(map(len, texts)),
            )
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def _check_bytes(self, texts: Sequence[str]) -> None:
        """Raise TextError for bytes without a token, which the reference would drop silently.

        The texts have been encoded, so that their normalization is known to end.
        """
        if not self._missing_bytes:
            return
        normalizer = self._reference.normalizer
        for text in texts:
            text = normalizer.normalize_str(text) if normalizer is not None else text
            if lacking := self._missing_bytes.intersection(text.encode()):
                raise self._no_ids(f"byte 0x{min(lacking):02x} has no token")

    @contextmanager
    def _text_errors(self, texts: Sequence[str]) -> Iterator[None]:
        """Raise what a library raises for a text as TextError, or a byte of it that has no token.

        A limit that the library reaches is not the text's fault.
        """
        try:
            with panics_as_errors():
                yield
        except TimeIsOver as error:
            raise self._has_no_end(error) from None
        except Exception as error:
            if limit_of(error) is not None:
                raise
            self._check_bytes(texts)
            raise self._no_ids(first_line(error)) from None
        self._check_bytes(texts)

    def _has_no_end(self, error: TimeIsOver) -> TokenizerError:
        return TokenizerError(f"tokenizer {self.name}: {error}; choose another tokenizer")

    def _no_ids(self, reason: str) -> TextError:
        return TextError(f"tokenizer {self.name}: a text cannot be encoded: {reason}; choose another tokenizer", reason)

    @cached_property
    def _decoders(self) -> list[dict[str, Any]]:
        return steps_of(self._definition, "decoder")

    @cached_property
    def _byte_level(self) -> bool:
        return any(step.get("type") == "ByteLevel" for step in self._decoders)

    @cached_property
    def _text_bytes(self) -> list[bytes]:
        """The bytes of each id's text."""
        table = [b""] * self.vocab_size
        to_bytes = byte_level_bytes if self._byte_level else marked_bytes
        for token, index in vocabulary_of(self._definition, added=False).items():
            table[index] = to_bytes(token)
        for added in self._definition["added_tokens"]:
            table[added["id"]] = added["content"].encode()
        table[self.bos_id] = table[self.eos_id] = b""
        return table

    @cached_property
    def token_bytes(self) -> NDArray[np.uint32]:
        if not self._byte_level:
            return np.fromiter(map(len, self._text_bytes), np.uint32, count=self.vocab_size)
        lengths = np.zeros(self.vocab_size, np.uint32)  # each character of a byte-level token is one byte
        tokens = vocabulary_of(self._definition, added=False)
        lengths[np.fromiter(tokens.values(), np.int64, count=len(tokens))] = [*map(len, tokens)]
        for added in self._definition["added_tokens"]:
            lengths[added["id"]] = len(added["content"].encode())
        lengths[[self.bos_id, self.eos_id]] = 0
        return lengths

    def decode(self, ids: NDArray[np.integer[Any]] | Sequence[int]) -> str:
        self._check_ids(ids)
        if self._byte_level:
            return b"".join(map(self._text_bytes.__getitem__, ids)).decode("utf-8", errors="replace")
        with_text = [int(index) for index in ids if index not in (self.bos_id, self.eos_id)]
        try:
            with panics_as_errors():
                (text,) = within_limit(
                    lambda: self._reference.decode_batch([with_text], skip_special_tokens=False),
                    characters=_CHARACTERS_OF_TOKEN * len(with_text),
                )
        except TimeIsOver as error:
            raise self._has_no_end(error) from None
        except LibraryPanic as error:
            raise TokenizerError(
                f"tokenizer {self.name}: its decoder fails ({first_line(error)}); choose another tokenizer"
            ) from None
        return str(text)

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        if self._byte_level:
            return decode_bytes(self._text_bytes, tokens)
        if all(_is_local(step) for step in self._decoders):
            return self._decode_in_segments(tokens)
        return self._decode_from_the_beginning(tokens)

    def _decode_in_segments(self, tokens: Iterable[int]) -> Iterator[str]:
        """Decode by segments: a segment is a token, or a run of single bytes, which are only decodable together.

        Decoders treat the beginning of a text specially, so each segment is decoded after those before it, back to the
        last one with text.
        """
        has_bytes = any(step.get("type") == "ByteFallback" for step in self._decoders)
        with_text: list[int] = []  # the last segment that has text by itself
        context: list[int] = []
        segment: list[int] = []
        for token in itertools.chain(tokens, [None]):
            if token in (self.bos_id, self.eos_id):  # `decode` skips them too
                continue
            if token is not None and has_bytes and token in self._single_bytes:
                segment.append(token)
                continue
            for part in ([segment] if segment else []) + ([[token]] if token is not None else []):
                before, after = self.decode(context), self.decode([*context, *part])
                if len(after) > len(before):
                    yield after[len(before) :]
                if self.decode(part):
                    with_text = context = list(part)
                elif before:  # it may still separate its neighbors
                    context = [*with_text, *part]
                else:
                    with_text = context = [*context, *part]
            segment = []

    def _decode_from_the_beginning(self, tokens: Iterable[int]) -> Iterator[str]:
        """Decode with decoders that may change any earlier text, such as a replacement over several tokens."""
        seen: list[int] = []
        written, text = 0, ""
        for token in tokens:
            seen.append(token)
            text = self.decode(seen)
            finished = len(text.rstrip("\ufffd"))  # an incomplete character may be completed
            if finished > written:
                yield text[written:finished]
                written = finished
        if len(text) > written:
            yield text[written:]

    @cached_property
    def _single_bytes(self) -> frozenset[int]:
        vocabulary = vocabulary_of(self._definition)
        return frozenset(index for token, index in vocabulary.items() if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token))

    def _write_files(self, folder: Path) -> None:
        write_atomically(folder / "tokenizer.json", self._content, durable=False)
        special = {"bos_token": self._bos_token, "eos_token": self._eos_token}
        config = special | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name, values in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
            content = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
            write_atomically(folder / name, content.encode(), durable=False)


def _searches_added_tokens(definition: dict[str, Any]) -> bool:
    """Return whether regular expressions of the normalizer meet added tokens when the definition is read."""
    has_expressions = any("Regex" in (step.get("pattern") or ()) for step in steps_of(definition, "normalizer"))
    return has_expressions and any(token.get("normalized", True) for token in definition["added_tokens"])


def _is_local(decoder: dict[str, Any]) -> bool:
    """Return True if a decoder's output for a token depends only on it, its neighbor and the beginning of the text."""
    match decoder.get("type"):
        case "ByteFallback" | "Fuse" | "Metaspace" | "WordPiece" | "BPEDecoder":
            return True
        case "Replace":
            pattern = decoder.get("pattern")
            return isinstance(pattern, dict) and len(pattern.get("String", "")) == 1
        case "Strip":
            return not decoder.get("stop")
        case _:
            return False
