"""RWKV World's tokenizer for `transformers`: exports of World models carry this file and the vocabulary.

    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

It needs nothing but transformers. The ids are greedy longest matches over the bytes of the text, which no model of the
tokenizers library computes, so there is no exact tokenizer.json. A text that spells the end token out is encoded as
the characters it consists of. With `starts_with_bos`, as in self-contained exports, each text begins with the end
token, as documents began in training.
"""

from __future__ import annotations

import ast
import os
import shutil
from typing import Any

from transformers import PreTrainedTokenizer

VOCABULARY_NAME = "rwkv_vocab_v20230424.txt"
END = "<|endoftext|>"  # id 0, which has no text


class RWKVWorldTokenizer(PreTrainedTokenizer):
    """RWKV World's tokenizer for transformers: the longest entry of the vocabulary at each byte."""

    vocab_files_names = {"vocab_file": VOCABULARY_NAME}  # noqa: RUF012  # as transformers reads it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, *, starts_with_bos: bool = False, **options: Any) -> None:
        self.vocab_file = vocab_file
        self.starts_with_bos = starts_with_bos
        self._bytes_of: dict[int, bytes] = {}
        with open(vocab_file, encoding="utf-8") as file:
            for line in file.read().splitlines():  # `id repr length`
                index, _, rest = line.partition(" ")
                token = ast.literal_eval(rest.rpartition(" ")[0])
                self._bytes_of[int(index)] = token if isinstance(token, bytes) else token.encode()
        self._id_of = {token: index for index, token in self._bytes_of.items()}
        self._longest: dict[bytes, int] = {}  # by the first two bytes, so that few lengths are tried
        for token in self._id_of:
            self._longest[token[:2]] = max(self._longest.get(token[:2], 0), len(token))
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            options.setdefault(name, END)
        options.setdefault("clean_up_tokenization_spaces", False)
        options["added_tokens_decoder"] = {0: _end_token()}
        options["split_special_tokens"] = True
        super().__init__(starts_with_bos=starts_with_bos, **options)

    @property
    def vocab_size(self) -> int:
        return 65536  # rows of the models' embeddings; the highest id is 65529

    def get_vocab(self) -> dict[str, int]:
        return {END: 0} | {_spelled(token): index for token, index in self._id_of.items()}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        encoded, tokens, at = text.encode(), [], 0
        while at < len(encoded):
            size = self._longest.get(encoded[at : at + 2], 1)
            while encoded[at : at + size] not in self._id_of:
                size -= 1
                if size < 1:
                    raise ValueError(f"{self.vocab_file}: byte 0x{encoded[at]:02x} has no token; copy the file again")
            token = encoded[at : at + size]
            tokens.append(_spelled(token))
            at += len(token)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self._id_of.get(token.encode("latin-1", errors="replace"), 0)

    def _convert_id_to_token(self, index: int) -> str:
        return _spelled(self._bytes_of.get(index, b""))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        joined = b"".join(token.encode("latin-1") for token in tokens if token != END)
        return joined.decode("utf-8", errors="replace")

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **_: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        end = b"" if skip_special_tokens else END.encode()
        pieces = (end if index == 0 else self._bytes_of.get(index, b"") for index in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        bos = [0] if self.starts_with_bos else []
        return bos + token_ids_0 + ([] if token_ids_1 is None else bos + token_ids_1)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        file = os.path.join(save_directory, VOCABULARY_NAME)
        if os.path.abspath(file) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, file)
        return (file,)


def _spelled(token: bytes) -> str:
    """Return a token as a string, which transformers requires: a character of Latin-1 for each byte."""
    return token.decode("latin-1")


def _end_token() -> Any:
    from transformers import AddedToken

    return AddedToken(END, special=True, normalized=False)
