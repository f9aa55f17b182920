"""The interface of every tokenizer, its errors, and what the kinds of tokenizers share.

A tokenizer encodes *text only*: neither bos nor eos is added, and a text that spells out a special token
("<|end_of_text|>") is encoded as its characters, so a document cannot contain a false end.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from streaming_rwkv.errors import UserError
from streaming_rwkv.filesystem import read_regular_file, write_atomically
from streaming_rwkv.shards import LARGEST_FILE_BYTES, TokenizerRecord, offsets_of

RECORD_NAME = "record.json"


class TokenizerError(UserError):
    """A tokenizer that cannot be read, or that does not meet the on-disk contract."""


MOST_TOKEN_BYTES = 1 << 12  # the longest in use have hundreds; reading or searching takes the square of it


def wrong_field(where: str, field: str, found: object, expected: str) -> TokenizerError:
    """Return the error for a field of a tokenizer's file."""
    return TokenizerError(
        f"{where}: {field}: found {repr(found)[:60]}, expected {expected}; save the tokenizer again, or copy it "
        "again from its source"
    )


class TextError(TokenizerError):
    """A text that the tokenizer cannot encode; `reason` is the same for all texts with the same fault."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """The ids of N texts, concatenated: text i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: NDArray[np.uint32]  # (offsets[-1],)
    offsets: NDArray[np.int64]  # (N + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def of(cls, texts: Sequence[NDArray[np.uint32]]) -> TokenBatch:
        """Return the batch of texts that were encoded one by one."""
        return cls(
            ids=np.concatenate([np.empty(0, np.uint32), *texts]), offsets=offsets_of([len(ids) for ids in texts])
        )


class Tokenizer(ABC):
    """A mapping of text to ids and back.

    Attributes:
        vocab_size: the size of a model's embedding; every id is below it.
        bos_id, eos_id: the first and last id of a stored document; equal if the vocabulary has only one of them.
        sha256: a hash of everything that decides the ids.
    """

    kind: Literal["huggingface", "rwkv-world"]
    name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    _fast_is_wrong = False

    @property
    @abstractmethod
    def sha256(self) -> str: ...

    @property
    @abstractmethod
    def token_bytes(self) -> NDArray[np.uint32]:
        """(vocab_size,) The number of UTF-8 bytes of each id's text; 0 for ids without text (bos, eos, unused).

        Exact for a byte-level vocabulary. For others (a normalizer, SentencePiece's marked spaces) it is the weight by
        which a document's bytes are divided among its pieces.
        """

    @abstractmethod
    def load(self) -> None:
        """Load the data for encoding before the first text; starts no threads, so the process can fork afterwards.

        Raises:
            TokenizerError: no library supports the files.
        """

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> TokenBatch:
        """Encode each text, without bos and eos, into one buffer.

        Raises:
            TextError: one of the texts cannot be encoded with the vocabulary.
        """

    @abstractmethod
    def encode_reference(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Encode with the reference implementation, which is slow; used to check a sample of `encode_batch`."""

    @abstractmethod
    def decode(self, ids: NDArray[np.integer[Any]] | Sequence[int]) -> str:
        """Return the text of `ids`. bos and eos have no text; a character that is cut at an end becomes U+FFFD.

        Raises:
            TokenizerError: an id is outside of the vocabulary.
        """

    @abstractmethod
    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the parts of `decode(tokens)` as soon as no later token can change them, in linear time."""

    @abstractmethod
    def _write_files(self, folder: Path) -> None: ...

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Encode one text, without bos and eos."""
        return self.encode_batch([text]).ids

    def _check_ids(self, ids: NDArray[np.integer[Any]] | Sequence[int]) -> None:
        least, most = min(map(int, ids), default=0), max(map(int, ids), default=0)
        if least < 0 or most >= self.vocab_size:
            raise TokenizerError(
                f"tokenizer {self.name}: found ids from {least} to {most}, expected 0 to {self.vocab_size - 1}"
            )

    def use_reference(self) -> None:
        """Make `encode_batch` use the reference from now on, because the fast library's ids differ."""
        self._fast_is_wrong = True

    def record(self) -> TokenizerRecord:
        """Return the record of this tokenizer for a manifest or folder."""
        return TokenizerRecord(
            kind=self.kind,
            name=self.name,
            sha256=self.sha256,
            vocab_size=self.vocab_size,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
        )

    def save(self, folder: str | Path) -> None:
        """Write all files to `folder`, creating it if missing; `load_tokenizer` loads the same tokenizer from it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_files(folder)
        record = orjson.dumps(self.record().model_dump(), option=orjson.OPT_INDENT_2)
        write_atomically(folder / RECORD_NAME, record, durable=False)


def read_tokenizer_file(file: Path) -> bytes:
    """Return the content of one of a tokenizer's files.

    Raises:
        TokenizerError: not a regular file, too large, or unreadable.
    """
    try:
        return read_regular_file(file, most=LARGEST_FILE_BYTES)
    except UserError as error:
        raise TokenizerError(str(error)) from None


def decode_bytes(text_bytes: Sequence[bytes], tokens: Iterable[int]) -> Iterator[str]:
    """Yield each character as soon as its last byte has arrived."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if text := decoder.decode(text_bytes[token]):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error."""
    return str(error).strip().partition("\n")[0]
