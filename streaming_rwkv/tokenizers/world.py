"""RWKV World's tokenizer: ids through pyrwkv_tokenizer, and BlinkDL's algorithm as the reference."""

from __future__ import annotations

import ast
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_rwkv.errors import panics_as_errors
from streaming_rwkv.filesystem import write_atomically
from streaming_rwkv.shards import offsets_of
from streaming_rwkv.tokenizers.base import (
    TokenBatch,
    Tokenizer,
    TokenizerError,
    decode_bytes,
    first_line,
    read_tokenizer_file,
)

WORLD_NAME = "rwkv-world"
WORLD_VOCABULARY = "rwkv_vocab_v20230424.txt"
_MOST_TOKEN_BYTES = 1 << 10  # BlinkDL's longest has 128; the trie takes as many calls, one in the other
_MOST_BYTES = 1 << 20  # of all tokens: BlinkDL's have 373,358, for which the trie takes 0.2 GB
_WORLD_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"


class WorldTokenizer(Tokenizer):
    """RWKV World's tokenizer: greedy longest match in a trie of bytes. Id 0, without text, is bos and eos."""

    kind = "rwkv-world"
    vocab_size = 65536  # the size of World models' embeddings; the highest id in the vocabulary is 65529
    bos_id = 0
    eos_id = 0

    def __init__(self, vocabulary: Path, *, name: str) -> None:
        """Create from a vocabulary file.

        Raises:
            TokenizerError: the file is not a vocabulary with which every text can be encoded.
        """
        self.name = name
        self._vocabulary = vocabulary
        if self.sha256 != _WORLD_SHA256:  # BlinkDL's own is known to be valid, and reading it takes 0.3 s
            self._text_bytes  # noqa: B018

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(read_tokenizer_file(self._vocabulary)).hexdigest()

    @cached_property
    def _text_bytes(self) -> list[bytes]:
        """The bytes of each id's text."""
        table = [b""] * self.vocab_size
        ids: dict[bytes, int] = {}

        def refuse(number: int, line: str, expected: str) -> TokenizerError:
            return TokenizerError(
                f"{self._vocabulary}:{number}: found {line[:40]!r}, expected {expected}; copy the file again from its "
                "source"
            )

        try:
            lines = read_tokenizer_file(self._vocabulary).decode().splitlines()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{self._vocabulary}: not UTF-8 ({error}); copy it again from its source") from None
        for number, line in enumerate(lines, start=1):
            first, _, rest = line.partition(" ")  # a line is `id repr length`
            literal, _, length = rest.rpartition(" ")
            try:
                simple = literal[:1] == "'" and "\\" not in literal
                written = literal[1:-1] if simple else ast.literal_eval(literal)
                token: bytes = written if isinstance(written, bytes) else written.encode()
                index, valid = int(first), len(token) == int(length)
            except (ValueError, SyntaxError, AttributeError, RecursionError, MemoryError):
                valid = False
            if not valid:
                raise refuse(number, line, "`id repr length`")
            if not 1 <= index < self.vocab_size:
                raise refuse(number, line, f"an id from 1 to {self.vocab_size - 1}")
            if not 1 <= len(token) <= _MOST_TOKEN_BYTES:
                raise refuse(number, line, f"a token of 1 to {_MOST_TOKEN_BYTES:,} bytes")
            if table[index]:
                raise refuse(number, line, f"an id of its own: {index} is {table[index]!r} already")
            if token in ids:
                raise refuse(number, line, f"a token of its own: {token!r} is id {ids[token]} already")
            table[index], ids[token] = token, index
        if (size := sum(map(len, ids))) > _MOST_BYTES:
            raise TokenizerError(
                f"{self._vocabulary}: its tokens have {size:,} bytes together, expected at most {_MOST_BYTES:,}; copy "
                "it again from its source"
            )
        if lacking := [byte for byte in range(256) if bytes([byte]) not in ids]:
            raise TokenizerError(
                f"{self._vocabulary}: {len(lines)} lines, and {len(lacking)} of the 256 single bytes are not tokens "
                f"(the first is 0x{lacking[0]:02x}), so not every text can be encoded; it may be cut off: copy it "
                "again from its source"
            )
        return table

    @cached_property
    def token_bytes(self) -> NDArray[np.uint32]:
        return np.fromiter(map(len, self._text_bytes), np.uint32, count=self.vocab_size)

    @cached_property
    def _trie(self) -> Any:
        import pyrwkv_tokenizer

        self._text_bytes  # noqa: B018  # checks the file, since the Rust constructor panics on a malformed one
        try:
            with panics_as_errors():
                return pyrwkv_tokenizer.WorldTokenizer(str(self._vocabulary))
        except Exception as error:  # noqa: BLE001  # the binding raises nothing narrower
            raise TokenizerError(
                f"{self._vocabulary}: pyrwkv_tokenizer cannot read it ({first_line(error)}); write tokens as in "
                "BlinkDL's file: 'text' for text, b'\\x..' for bytes that are not text"
            ) from None

    def load(self) -> None:
        self._trie  # noqa: B018

    def encode_batch(self, texts: Sequence[str]) -> TokenBatch:
        if self._fast_is_wrong:
            return TokenBatch.of(self.encode_reference(texts))
        lists = self._trie.encode_batch(list(texts))
        offsets = offsets_of(np.fromiter(map(len, lists), np.int64, count=len(lists)))
        ids = np.fromiter(itertools.chain.from_iterable(lists), np.uint32, count=int(offsets[-1]))
        return TokenBatch(ids=ids, offsets=offsets)

    @cached_property
    def _greedy(self) -> Callable[[bytes], list[int]]:
        """BlinkDL's algorithm without a trie: at each position, the longest token that matches."""
        tokens = {token: index for index, token in enumerate(self._text_bytes) if token}
        lengths: dict[bytes, set[int]] = {}  # by the first two bytes, so that few are tried
        for token in tokens:
            lengths.setdefault(token[:2], {1}).add(len(token))
        longest_first = {begin: sorted(found, reverse=True) for begin, found in lengths.items()}

        def encode(text: bytes) -> list[int]:
            ids, at = [], 0
            while at < len(text):
                tried = (text[at : at + size] for size in longest_first.get(text[at : at + 2], (1,)))
                token = next(token for token in tried if token in tokens)  # every single byte is one
                ids.append(tokens[token])
                at += len(token)
            return ids

        return encode

    def encode_reference(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.array(self._greedy(text.encode()), np.uint32) for text in texts]

    def decode(self, ids: NDArray[np.integer[Any]] | Sequence[int]) -> str:
        self._check_ids(ids)
        return b"".join(map(self._text_bytes.__getitem__, ids)).decode("utf-8", errors="replace")

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        return decode_bytes(self._text_bytes, tokens)

    def _write_files(self, folder: Path) -> None:
        write_atomically(folder / WORLD_VOCABULARY, read_tokenizer_file(self._vocabulary), durable=False)
