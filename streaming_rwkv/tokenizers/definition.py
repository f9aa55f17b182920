"""The content of a tokenizer.json: checks of its fields, and the vocabulary and bytes of its tokens."""

from __future__ import annotations

import re
from typing import Any

from streaming_rwkv.tokenizers.base import MOST_TOKEN_BYTES, TokenizerError, wrong_field
from streaming_rwkv.tokenizers.steps import check_steps, steps_of

MOST_WORD_CHARACTERS = 1000  # of a word that WordPiece cuts into pieces; BERT's is 100
MOST_AFFIX_CHARACTERS = 16  # before or after a piece of a word, as in ##ing and </w>
MOST_IDS = 1 << 24  # a hundred times the largest vocabulary in use; tables have a row per id
MOST_CHARACTERS = 1 << 23  # of all tokens: twenty times RWKV World's; a library takes up to 350 bytes each
_TOKEN = {"id": int, "content": str}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def check_definition(definition: Any, *, where: str) -> dict[str, Any]:
    """Return a parsed tokenizer.json after checking the form of every field that is used here.

    Raises:
        TokenizerError: a field is wrong; the error names the file and the field.
    """
    if not (isinstance(definition, dict) and isinstance(definition.get("model"), dict)):
        raise TokenizerError(f"{where}: no Hugging Face tokenizer: it has no 'model'; save it again")
    ids = _Ids(where)
    _check_vocabulary(definition["model"].get("vocab", {}), ids)
    _check_merges(definition["model"].get("merges"), where)
    _check_words(definition["model"], where)
    _check_added_tokens(definition.get("added_tokens", []), ids)
    check_steps(definition, where=where)
    return definition


class _Ids:
    """The ids of a definition's tokens, checked as they are added."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.tokens: dict[int, str] = {}
        self.characters = 0

    def check_length(self, token: str, field: str) -> None:
        if len(token) > MOST_TOKEN_BYTES or len(token.encode(errors="replace")) > MOST_TOKEN_BYTES:
            short = field.replace(token, f"{token[:20]}…")
            raise wrong_field(self.where, short, f"{len(token):,} characters", f"at most {MOST_TOKEN_BYTES:,} bytes")
        self.characters += len(token)
        if self.characters > MOST_CHARACTERS:
            expected = f"at most {MOST_CHARACTERS:,} characters of all tokens together"
            part = field.partition("[")[0]  # model.vocab, or added_tokens
            raise TokenizerError(f"{self.where}: {part}: found more, expected {expected}; choose another tokenizer")

    def add(self, token: str, index: Any, field: str) -> None:
        self.check_length(token, field)
        if type(index) is not int or not 0 <= index < MOST_IDS:
            raise wrong_field(self.where, field, index, f"an id from 0 to {MOST_IDS - 1}")
        if self.tokens.setdefault(index, token) != token:
            raise TokenizerError(
                f"{self.where}: {field}: id {index} belongs to {self.tokens[index]!r} and to {token!r}; two tokens "
                "cannot share an id: save the tokenizer again, or copy it again from its source"
            )


def _check_vocabulary(vocabulary: Any, ids: _Ids) -> None:
    match vocabulary:
        case dict():
            for token, index in vocabulary.items():
                ids.add(token, index, f"model.vocab[{token!r}]")
        case list():
            for index, pair in enumerate(vocabulary):
                match pair:
                    case [str(), int() | float()]:
                        ids.check_length(pair[0], f"model.vocab[{index}]")
                        ids.tokens[index] = pair[0]
                    case _:
                        raise wrong_field(ids.where, f"model.vocab[{index}]", pair, "[token, score]")
        case _:
            expected = "a mapping of tokens to ids, or a list of [token, score]"
            raise wrong_field(ids.where, "model.vocab", vocabulary, expected)


def _check_merges(merges: Any, where: str) -> None:
    if merges is None:
        return
    if not isinstance(merges, list):
        raise wrong_field(where, "model.merges", merges, "a list")
    is_text = bool(merges) and isinstance(merges[0], str)
    for at, merge in enumerate(merges):
        match merge:
            case str() if is_text:
                pass
            case [str(), str()] if not is_text:
                pass
            case _:
                expected = '"left right" or ["left", "right"], the same in all'
                raise wrong_field(where, f"model.merges[{at}]", merge, expected)


def _check_words(model: dict[str, Any], where: str) -> None:
    """Check what the time for a word grows with: to cut it into pieces takes the cube of its length."""
    most = model.get("max_input_chars_per_word", 0)
    if type(most) is not int or not 0 <= most <= MOST_WORD_CHARACTERS:
        raise wrong_field(where, "model.max_input_chars_per_word", most, f"a number up to {MOST_WORD_CHARACTERS:,}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        affix = model.get(name) or ""
        if not isinstance(affix, str) or len(affix) > MOST_AFFIX_CHARACTERS:
            raise wrong_field(where, f"model.{name}", affix, f"a text of up to {MOST_AFFIX_CHARACTERS} characters")


def _check_added_tokens(added: Any, ids: _Ids) -> None:
    if not isinstance(added, list):
        raise wrong_field(ids.where, "added_tokens", added, "a list")
    by_token = {token: index for index, token in ids.tokens.items()}
    for at, token in enumerate(added):
        field = f"added_tokens[{at}]"
        if not isinstance(token, dict):
            raise wrong_field(ids.where, field, token, 'a mapping with "id" and "content"')
        for key, kind in _TOKEN.items():
            if type(token.get(key)) is not kind or token[key] == "":
                expected = "a text" if kind is str else "a number"
                raise wrong_field(ids.where, f"{field}.{key}", token.get(key), expected)
        for key in _FLAGS:
            if not isinstance(token.get(key, False), bool):
                raise wrong_field(ids.where, f"{field}.{key}", token[key], "true or false")
        ids.add(token["content"], token["id"], f"{field}.id")
        known = by_token.setdefault(token["content"], token["id"])
        if known != token["id"]:
            raise wrong_field(ids.where, f"{field}.id", token["id"], f"{known}, the id of {token['content']!r} above")


def missing_bytes(definition: dict[str, Any]) -> frozenset[int]:
    """Return the bytes of UTF-8 that a byte-level BPE cannot encode: it has no token for them and no unknown token."""
    model = definition["model"]
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps_of(definition, "pre_tokenizer"))
    if not is_byte_level or model.get("type", "BPE") != "BPE" or model.get("unk_token") or model.get("byte_fallback"):
        return frozenset()
    tokens = model.get("vocab", {})
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}  # not used by UTF-8
    return frozenset(
        byte for byte, character in byte_characters().items() if character not in tokens and byte not in never
    )


def without_dropout(model: dict[str, Any]) -> dict[str, Any]:
    """Return the change that turns off BPE dropout, with which ids would be random."""
    return {"dropout": None} if model.get("dropout") else {}


def vocabulary_of(definition: dict[str, Any], *, added: bool = True) -> dict[str, int]:
    """Return the id of each token; Unigram models list [token, score] pairs in the order of ids."""
    vocabulary = definition["model"].get("vocab", {})
    ids = {token: index for index, (token, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary
    return ids | {token["content"]: token["id"] for token in definition.get("added_tokens", [])} if added else ids


def merges_as_strings(model: dict[str, Any]) -> dict[str, list[str]]:
    """Return the change that writes merges as "left right", which all libraries read, twice as fast as pairs."""
    merges = model.get("merges")
    if not merges or isinstance(merges[0], str) or any(" " in token for token in model.get("vocab", ())):
        return {}
    return {"merges": [f"{left} {right}" for left, right in merges]}


def examples(definition: dict[str, Any]) -> str:
    """Return some special tokens, for an error message."""
    special = [token["content"] for token in definition.get("added_tokens", []) if token.get("special")]
    return ", ".join(special[:4]) if special else "the tokens of its vocabulary"


def with_special(added: list[dict[str, Any]], ids: dict[str, int], special: tuple[str, str]) -> list[dict[str, Any]]:
    """Mark bos and eos as special, so that a text that spells them out is encoded as ordinary tokens."""
    known = {token["content"] for token in added}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    missing = [{"id": ids[token], "content": token, **plain} for token in dict.fromkeys(special) if token not in known]
    return [{**token, "special": token.get("special") or token["content"] in special} for token in [*added, *missing]]


def byte_characters() -> dict[int, str]:
    """Return GPT-2's printable character for each byte: itself if printable in Latin-1, else the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


_CHARACTER_BYTE = {character: bytes([byte]) for byte, character in byte_characters().items()}


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token."""
    return b"".join([_CHARACTER_BYTE.get(character) or character.encode() for character in token])


def marked_bytes(token: str) -> bytes:
    """Return the bytes of a token of SentencePiece, which writes spaces as U+2581 and single bytes as <0xNN>."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.removeprefix("##").replace("▁", " ").encode()
