"""One interface for all tokenizers: Hugging Face's and RWKV World's.

`load_tokenizer` accepts `rwkv-world`, a folder, a `tokenizer.json`, Llama 3's `tokenizer.model`, or a name on the
Hugging Face hub. `Tokenizer.save` writes a self-contained folder, which loads as the same tokenizer here, and in
`transformers.AutoTokenizer` for the Hugging Face kind.

Nothing here imports torch or transformers, except to convert a hub repository without a tokenizer.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import orjson

from streaming_rwkv.location import checked_local, expand_user
from streaming_rwkv.shards import DataError, Manifest, TokenizerRecord
from streaming_rwkv.tokenizers.base import (
    RECORD_NAME,
    TextError,
    TokenBatch,
    Tokenizer,
    TokenizerError,
    first_line,
    read_tokenizer_file,
)
from streaming_rwkv.tokenizers.definition import check_definition
from streaming_rwkv.tokenizers.huggingface import HUB_FILES, HuggingFaceTokenizer
from streaming_rwkv.tokenizers.tiktoken import LLAMA3_BOS, LLAMA3_EOS, llama3_definition, read_tiktoken
from streaming_rwkv.tokenizers.world import WORLD_NAME, WORLD_VOCABULARY, WorldTokenizer
from streaming_rwkv.version import PROGRAM

__all__ = [
    "RECORD_NAME",
    "SAVED_FILES",
    "WORLD_NAME",
    "WORLD_VOCABULARY",
    "HuggingFaceTokenizer",
    "TextError",
    "TokenBatch",
    "Tokenizer",
    "TokenizerError",
    "WorldTokenizer",
    "load_tokenizer",
    "load_tokenizer_of",
]

# The files that `Tokenizer.save` writes, by kind, for readers that cannot list a folder.
SAVED_FILES = {"huggingface": [*HUB_FILES, RECORD_NAME], "rwkv-world": [WORLD_VOCABULARY, RECORD_NAME]}


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
    path = expand_user(checked_local(name_or_path, remedy="copy the tokenizer's folder to this machine"))
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
            f"tokenizer {name!r}: no{'' if path.exists() else ' such'} file or folder; give {WORLD_NAME!r}, a folder "
            "with a tokenizer.json, or a name on the Hugging Face hub"
        )
    return _load_from_hub(name, bos_token=bos_token, eos_token=eos_token)


def load_tokenizer_of(manifest: Manifest, folder: Path, *, where: str | None = None) -> Tokenizer:
    """Load the tokenizer of a data set, and compare it with the one that made the tokens.

    Args:
        where: the place that errors name, if `folder` is a copy.
    Raises:
        TokenizerError: see `load_tokenizer`.
        DataError: a field of its record differs from the manifest's.
    """
    tokenizer = load_tokenizer(folder)
    found, expected = tokenizer.record().model_dump(), manifest.tokenizer.model_dump()
    for field, value in expected.items():
        if found[field] != value:
            raise DataError(
                f"{where or folder}: {field} is {found[field]!r}, that of the tokenizer that made the tokens is "
                f"{value!r}; restore it, or rebuild with `{PROGRAM} prepare`"
            )
    return tokenizer


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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    unreachable = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except unreachable as error:
        if "/" not in name:  # nearly every name on the hub has one
            raise TokenizerError(
                f"tokenizer {name!r}: no such folder in {Path.cwd()}, and the Hugging Face hub does not provide it "
                f"({type(error).__name__}); create it with `{PROGRAM} train-tokenizer RECIPE --vocab-size N --to "
                f"{name}`, or give {WORLD_NAME!r}, another folder, or a name on the hub"
            ) from error
        raise TokenizerError(
            f"tokenizer {name!r}: not a local folder, and the Hugging Face hub does not provide it "
            f"({type(error).__name__}: {first_line(error)}); check the name, run `huggingface-cli login` if it is "
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
            why = "without running its own code, which is never done" if is_code else f"({first_line(error)})"
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
        raise TokenizerError(f"{file}: not a tokenizer record ({first_line(error)}); delete it") from None


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
