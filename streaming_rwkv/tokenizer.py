"""One interface for all tokenizers: Hugging Face's (fast ids through fastokens) and RWKV World's.

`load_tokenizer` accepts `rwkv-world`, a folder, a `tokenizer.json`, Llama 3's `tokenizer.model`, or a name on the
Hugging Face hub. The tokenizer encodes *text only*: neither bos nor eos is added, and a text that spells out a special
token ("<|end_of_text|>") is encoded as its characters, so a document cannot contain a false end. `save` writes a
self-contained folder, which loads as the same tokenizer here, and in `transformers.AutoTokenizer` for the Hugging Face
kind.

Nothing here imports torch or transformers, except to convert a hub repository without a tokenizer.json.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import itertools
import json
import logging
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from streaming_rwkv.location import checked_local
from streaming_rwkv.shards import TokenizerRecord, sha256_of_file
from streaming_rwkv.tokenizer_json import (
    LLAMA3_BOS,
    LLAMA3_EOS,
    TextError,
    TokenizerError,
    byte_level_bytes,
    check_definition,
    examples,
    llama3_definition,
    marked_bytes,
    merges_as_strings,
    missing_bytes,
    read_tiktoken,
    read_tokenizer_file,
    steps_of,
    vocabulary_of,
    with_special,
    without_dropout,
)

logger = logging.getLogger(__name__)

WORLD_NAME = "rwkv-world"
WORLD_VOCABULARY = "rwkv_vocab_v20230424.txt"
_WORLD_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"
RECORD_NAME = "record.json"
_HUB_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
# The files that `Tokenizer.save` writes, by kind, for readers that cannot list a folder.
SAVED_FILES = {"huggingface": [*_HUB_FILES, RECORD_NAME], "rwkv-world": [WORLD_VOCABULARY, RECORD_NAME]}


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """The ids of N texts, concatenated: text i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: NDArray[np.uint32]  # (offsets[-1],)
    offsets: NDArray[np.int64]  # (N + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]


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
        """Return the text of `ids`. bos and eos have no text; a character that is cut at an end becomes U+FFFD."""

    @abstractmethod
    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the parts of `decode(tokens)` as soon as no later token can change them, in linear time."""

    @abstractmethod
    def _write_files(self, folder: Path) -> None: ...

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Encode one text, without bos and eos."""
        return self.encode_batch([text]).ids

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
        (folder / RECORD_NAME).write_bytes(orjson.dumps(self.record().model_dump(), option=orjson.OPT_INDENT_2))


def load_tokenizer(
    name_or_path: str | Path, *, bos_token: str | None = None, eos_token: str | None = None
) -> Tokenizer:
    """Load the tokenizer that `name_or_path` refers to.

        tokenizer = load_tokenizer("rwkv-world")
        tokenizer.decode(tokenizer.encode("Once upon a time"))

    Args:
        name_or_path: `rwkv-world`; a folder (of a data set, of transformers, or with Llama 3's `tokenizer.model`);
            one of these files itself; or a name on the Hugging Face hub such as `meta-llama/Llama-3.1-8B`.
        bos_token, eos_token: replace those that a Hugging Face tokenizer's files name, if any.

    Raises:
        TokenizerError: no readable tokenizer, no eos, or files that differ from their record.
        LocationError: the location is in object storage, or has a scheme.
    """
    path = Path(checked_local(name_or_path, remedy="copy the tokenizer's folder to this machine")).expanduser()
    if str(name_or_path) == WORLD_NAME:
        import pyrwkv_tokenizer

        vocabulary = Path(pyrwkv_tokenizer.__file__).parent / WORLD_VOCABULARY
        return WorldTokenizer(vocabulary, name=WORLD_NAME)
    if path.is_dir():
        return _load_folder(path, bos_token=bos_token, eos_token=eos_token)
    if path.is_file():
        return _load_file(
            path,
            name=path.resolve().parent.name,
            named=_special_names(path.parent),
            bos_token=bos_token,
            eos_token=eos_token,
        )
    name = str(name_or_path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in (".json", ".model", ".txt"):
        raise TokenizerError(
            f"tokenizer {name!r}: no such file or folder; give {WORLD_NAME!r}, a folder with a tokenizer.json, "
            "or a name on the Hugging Face hub"
        )
    return _load_from_hub(name, bos_token=bos_token, eos_token=eos_token)


def _load_folder(folder: Path, *, bos_token: str | None, eos_token: str | None) -> Tokenizer:
    record = _read_record(folder / RECORD_NAME)
    name = record.name if record else folder.resolve().name
    tokenizer: Tokenizer
    if (folder / WORLD_VOCABULARY).is_file():
        tokenizer = WorldTokenizer(folder / WORLD_VOCABULARY, name=name)
    else:
        file = next((file for name in ("tokenizer.json", "tokenizer.model") if (file := folder / name).is_file()), None)
        if file is None:
            raise TokenizerError(
                f"{folder}: found no tokenizer.json, tokenizer.model or {WORLD_VOCABULARY} in it; save one with "
                "transformers' AutoTokenizer.from_pretrained(…).save_pretrained(folder)"
            )
        tokenizer = _load_file(file, name=name, named=_special_names(folder), bos_token=bos_token, eos_token=eos_token)
    if record and record.sha256 != tokenizer.sha256 and not (bos_token or eos_token):
        raise TokenizerError(
            f"{folder}: its files have the hash {tokenizer.sha256}, its {RECORD_NAME} says {record.sha256}; they "
            f"were changed after they were saved: restore them, or delete {RECORD_NAME} if the change is intended"
        )
    return tokenizer


def _load_file(
    file: Path, *, name: str, named: dict[str, str], bos_token: str | None, eos_token: str | None
) -> Tokenizer:
    """Load a tokenizer from a file; `named` are the special tokens that other files in its folder name."""
    if file.name == WORLD_VOCABULARY:
        return WorldTokenizer(file, name=WORLD_NAME)
    if file.suffix == ".model":
        definition = llama3_definition(read_tiktoken(file))
        named = {"bos_token": LLAMA3_BOS, "eos_token": LLAMA3_EOS} | named
    else:
        content = read_tokenizer_file(file)
        try:
            definition = orjson.loads(content)
        except ValueError as error:
            raise TokenizerError(f"{file}: not valid JSON ({error}); save the tokenizer again") from None
    return HuggingFaceTokenizer(
        check_definition(definition, where=str(file)),
        name=name,
        bos_token=bos_token or named.get("bos_token"),
        eos_token=eos_token or named.get("eos_token"),
        where=str(file),
    )


def _load_from_hub(name: str, *, bos_token: str | None, eos_token: str | None) -> Tokenizer:
    import tempfile

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    unreachable = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except unreachable as error:
        if "/" not in name:  # nearly every name on the hub has one
            raise TokenizerError(
                f"tokenizer {name!r}: no such folder in {Path.cwd()}, and the Hugging Face hub does not provide it "
                f"({type(error).__name__}); create it with `python -m prep train-tokenizer RECIPE --vocab-size N --to "
                f"{name}`, or give {WORLD_NAME!r}, another folder, or a name on the hub"
            ) from error
        raise TokenizerError(
            f"tokenizer {name!r}: not a local folder, and the Hugging Face hub does not provide it "
            f"({type(error).__name__}: {_first_line(error)}); check the name, run `huggingface-cli login` if it is "
            "gated, or give a local folder"
        ) from error
    named = _special_names(folder)
    if (folder / "tokenizer.json").is_file():
        return _load_file(folder / "tokenizer.json", name=name, named=named, bos_token=bos_token, eos_token=eos_token)
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise TokenizerError(
            f"tokenizer {name!r}: the hub has no tokenizer.json for it; install transformers, which can convert it"
        ) from None
    with tempfile.TemporaryDirectory() as converted:
        try:
            # The commit of the snapshot; its own code is neither run nor offered to the user.
            theirs = AutoTokenizer.from_pretrained(name, revision=folder.name, trust_remote_code=False)
            theirs.save_pretrained(converted)
        except (ValueError, OSError, ImportError, LookupError, TypeError, AttributeError) as error:
            is_code = "trust_remote_code" in str(error)  # transformers advises to run it
            why = "without running its own code, which is never done" if is_code else f"({_first_line(error)})"
            raise TokenizerError(
                f"tokenizer {name!r}: the hub has no tokenizer.json for it, and transformers cannot convert what it "
                f"has {why}; choose another, or give a folder with a tokenizer.json"
            ) from None
        file = Path(converted) / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(f"tokenizer {name!r}: transformers has no fast tokenizer for it; choose another")
        return _load_file(file, name=name, named=_special_names(file.parent), bos_token=bos_token, eos_token=eos_token)


def _read_record(file: Path) -> TokenizerRecord | None:
    if not file.is_file():
        return None
    content = read_tokenizer_file(file)
    try:
        return TokenizerRecord.model_validate(orjson.loads(content))
    except ValueError as error:
        raise TokenizerError(f"{file}: not a tokenizer record ({_first_line(error)}); delete it") from None


def _special_names(folder: Path) -> dict[str, str]:
    """Return the bos_token and eos_token that transformers' files in `folder` name."""
    named: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if not file.is_file():
            continue
        content = read_tokenizer_file(file)
        try:
            values = orjson.loads(content)
        except ValueError as error:
            raise TokenizerError(f"{file}: not valid JSON ({error}); save the tokenizer again") from None
        if not isinstance(values, dict):
            raise TokenizerError(
                f"{file}: found a {type(values).__name__}, expected a mapping of names to tokens; save the "
                "tokenizer again"
            )
        for key in ("bos_token", "eos_token"):
            value = values.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                named[key] = value
    return named


def _is_panic(error: BaseException) -> bool:
    """Return True for a panic of a Rust library, which `except Exception` does not catch."""
    return type(error).__name__ == "PanicException"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


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

    @cached_property
    def _content(self) -> bytes:
        return orjson.dumps(self._definition, option=orjson.OPT_SORT_KEYS)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self._content + f"\n{self.bos_id} {self.eos_id}".encode()).hexdigest()

    @cached_property
    def _fast(self) -> Any | None:
        import fastokens

        try:
            return fastokens.Tokenizer.from_json_str(self._content.decode())
        except BaseException as error:
            if not isinstance(error, ValueError) and not _is_panic(error):
                raise
            logger.warning(
                "tokenizer %s: fastokens does not support it (%s); using Hugging Face's own, some twenty times slower",
                self.name,
                _first_line(error),
            )
            return None

    @cached_property
    def _reference(self) -> Any:
        import tokenizers

        try:
            reference = tokenizers.Tokenizer.from_str(self._content.decode())
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise TokenizerError(
                f"{self._where}: Hugging Face tokenizers {tokenizers.__version__} cannot read it ({_first_line(error)})"
            ) from None
        reference.encode_special_tokens = True
        return reference

    @cached_property
    def _missing_bytes(self) -> frozenset[int]:
        missing = missing_bytes(self._definition)
        if missing:
            logger.warning(
                "tokenizer %s: its byte-level vocabulary has no token for %d bytes (%s); texts with one of them "
                "are rejected. Train a tokenizer with all bytes: `python -m prep train-tokenizer`, or "
                "BpeTrainer(initial_alphabet=ByteLevel.alphabet())",
                self.name,
                len(missing),
                ", ".join(f"0x{byte:02x}" for byte in sorted(missing)[:4]) + ("…" if len(missing) > 4 else ""),
            )
        return missing

    def load(self) -> None:
        self._missing_bytes  # noqa: B018
        (None if self._fast_is_wrong else self._fast) or self._reference  # noqa: B018

    def encode_batch(self, texts: Sequence[str]) -> TokenBatch:
        if self._fast_is_wrong or self._fast is None:
            return _join(self.encode_reference(texts))
        self._check_bytes(texts)
        try:
            ids, offsets = self._fast.encode_batch_flat(list(texts), False, True)
        except ValueError as error:
            raise self._no_ids(_first_line(error)) from None
        return TokenBatch(ids=np.frombuffer(ids, np.uint32), offsets=np.frombuffer(offsets, np.int64))

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Encode one text with the reference: speed does not matter, and nothing would notice differing fast ids."""
        return self.encode_reference([text])[0]

    def encode_reference(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        reference = self._reference
        self._check_bytes(texts)
        try:
            encodings = reference.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # noqa: BLE001  # the binding raises nothing narrower
            raise self._no_ids(_first_line(error)) from None
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def _check_bytes(self, texts: Sequence[str]) -> None:
        """Raise TextError for bytes without a token, which the reference would drop silently."""
        if not self._missing_bytes:
            return
        normalizer = self._reference.normalizer
        for text in texts:
            text = normalizer.normalize_str(text) if normalizer is not None else text
            if lacking := self._missing_bytes.intersection(text.encode()):
                raise self._no_ids(f"byte 0x{min(lacking):02x} has no token")

    def _no_ids(self, reason: str) -> TextError:
        return TextError(f"tokenizer {self.name}: a text cannot be encoded: {reason}; choose another tokenizer", reason)

    @cached_property
    def _decoders(self) -> list[dict[str, Any]]:
        return steps_of(self._definition, "decoder", "decoders")

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
        if self._byte_level:
            return b"".join(map(self._text_bytes.__getitem__, ids)).decode("utf-8", errors="replace")
        text: str = self._reference.decode(
            [int(index) for index in ids if index not in (self.bos_id, self.eos_id)], skip_special_tokens=False
        )
        return text

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        if self._byte_level:
            return _decoded_bytes(self._text_bytes, tokens)
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
        (folder / "tokenizer.json").write_bytes(self._content)
        special = {"bos_token": self._bos_token, "eos_token": self._eos_token}
        config = special | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name, values in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
            (folder / name).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
        return sha256_of_file(self._vocabulary)

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
            if not token:
                raise refuse(number, line, "a token that is not empty")
            if table[index]:
                raise refuse(number, line, f"an id of its own: {index} is {table[index]!r} already")
            if token in ids:
                raise refuse(number, line, f"a token of its own: {token!r} is id {ids[token]} already")
            table[index], ids[token] = token, index
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
            return pyrwkv_tokenizer.WorldTokenizer(str(self._vocabulary))
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise TokenizerError(
                f"{self._vocabulary}: pyrwkv_tokenizer cannot read it ({_first_line(error)}); write tokens as in "
                "BlinkDL's file: 'text' for text, b'\\x..' for bytes that are not text"
            ) from None

    def load(self) -> None:
        self._trie  # noqa: B018

    def encode_batch(self, texts: Sequence[str]) -> TokenBatch:
        if self._fast_is_wrong:
            return _join(self.encode_reference(texts))
        lists = self._trie.encode_batch(list(texts))
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, lists), np.int64, count=len(lists)), out=offsets[1:])
        ids = np.fromiter(itertools.chain.from_iterable(lists), np.uint32, count=int(offsets[-1]))
        return TokenBatch(ids=ids, offsets=offsets)

    @cached_property
    def _greedy(self) -> Callable[[bytes], list[int]]:
        """BlinkDL's algorithm without a trie: at each position, the longest token that matches."""
        tokens = {token: index for index, token in enumerate(self._text_bytes) if token}
        longest: dict[bytes, int] = {}  # by the first two bytes, so that few lengths are tried
        for token in tokens:
            longest[token[:2]] = max(longest.get(token[:2], 0), len(token))

        def encode(text: bytes) -> list[int]:
            ids, at = [], 0
            while at < len(text):
                size = min(longest.get(text[at : at + 2], 1), len(text) - at)
                while text[at : at + size] not in tokens:
                    size -= 1
                    assert size  # every single byte is a token
                ids.append(tokens[text[at : at + size]])
                at += size
            return ids

        return encode

    def encode_reference(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.array(self._greedy(text.encode()), np.uint32) for text in texts]

    def decode(self, ids: NDArray[np.integer[Any]] | Sequence[int]) -> str:
        return b"".join(map(self._text_bytes.__getitem__, ids)).decode("utf-8", errors="replace")

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        return _decoded_bytes(self._text_bytes, tokens)

    def _write_files(self, folder: Path) -> None:
        shutil.copyfile(self._vocabulary, folder / WORLD_VOCABULARY)


def _decoded_bytes(text_bytes: Sequence[bytes], tokens: Iterable[int]) -> Iterator[str]:
    """Yield each character as soon as its last byte has arrived."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if text := decoder.decode(text_bytes[token]):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


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


def _join(arrays: list[NDArray[np.uint32]]) -> TokenBatch:
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(ids) for ids in arrays], out=offsets[1:])
    return TokenBatch(ids=np.concatenate([np.empty(0, np.uint32), *arrays]), offsets=offsets)
