"""Hooks: a user's functions that filter or transform a source's records."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.config import NOT_DECIDING, PrepConfig, SourceConfig
from prep.inputs.discovery import find_files
from prep.inputs.faults import FILTERED, INVALID_UTF8, TRANSFORMED_AWAY, BrokenRow, InputError, Reject, missing_text
from prep.inputs.files import InputFile, content_digest
from prep.inputs.hook_code import code_digest
from prep.inputs.token_ids import named_tokenizer
from streaming_rwkv.config import UserError

_LONGEST_REASON = 100
_MOST_REASONS = 100


class Hooks:
    """The hooks of a source, applied to the records of one of its files."""

    def __init__(self, config: SourceConfig, file: InputFile) -> None:
        self._config, self._file = config, file
        self._keep = load_hook(config.filter) if config.filter else None
        self._transform = load_hook(config.transform) if config.transform else None
        self._missing = BrokenRow(missing_text(config.text))
        self._rejected: dict[str, BrokenRow] = {}  # by reason

    def apply(self, records: Sequence[Any], *, rows: NDArray[np.int64]) -> list[Any]:
        """Return the text of each record, unchecked, or a BrokenRow if the record is rejected.

        Args:
            records: dicts; a BrokenRow among them is returned unchanged.

        Raises:
            InputError: a hook raised an exception, or returned a reason by which documents cannot be counted.
        """
        values: list[Any] = []
        for row, record in zip(rows.tolist(), records, strict=True):
            try:
                value = record if isinstance(record, BrokenRow) else self._text(record)
            # Everything that a user's hook may raise is reported with its row: sys.exit and a Rust panic too.
            except BaseException as error:
                if _is_ctrl_c(error):
                    raise
                raise InputError(
                    f"{self._file.path}: row {row}: a hook of `sources.{self._file.source}` raised "
                    f"{_shown(error)}; fix it, or let it return False or None for such a document"
                ) from error
            if isinstance(value, Reject):
                value = self._rejection(value.reason, row)
            values.append(_plain(value) if isinstance(value, str) else value)
        return values

    def _text(self, record: dict[str, Any]) -> Any:
        if self._keep is not None:
            kept = self._keep(record)
            if isinstance(kept, Reject) or (isinstance(kept, str) and kept):
                return kept if isinstance(kept, Reject) else Reject(kept)
            if not kept:
                return BrokenRow(FILTERED, is_requested=True)
        if self._transform is None:
            return record.get(self._config.text, self._missing)
        text = self._transform(record)
        return BrokenRow(TRANSFORMED_AWAY, is_requested=True) if text is None else text

    def _rejection(self, reason: Any, row: int) -> BrokenRow:
        if isinstance(reason, str) and reason in self._rejected:
            return self._rejected[reason]
        where = f"{self._file.path}: row {row}: a hook of `sources.{self._file.source}` returned"
        if not isinstance(reason, str) or not reason.isprintable() or not 0 < len(reason) <= _LONGEST_REASON:
            raise InputError(
                f"{where} the reason {str(reason)[:_LONGEST_REASON]!r}; expected one printable line of 1 to "
                f"{_LONGEST_REASON} characters, by which documents are counted"
            )
        if len(self._rejected) == _MOST_REASONS:
            raise InputError(
                f"{where} more than {_MOST_REASONS} different reasons, the last {reason!r}; documents are counted by "
                "reason: leave numbers and texts of the document out of it"
            )
        return self._rejected.setdefault(str.__str__(reason), BrokenRow(reason, is_requested=True))


def _is_ctrl_c(error: BaseException) -> bool:
    """Return True for Ctrl-C. Workers ignore its signal, so there the hook itself has raised the exception."""
    return isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) != signal.SIG_IGN


def _shown(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException as another:  # noqa: BLE001  # of a class of the user's
        return f"{type(error).__name__}, whose text cannot be shown ({type(another).__name__})"


def _plain(value: str) -> str | BrokenRow:
    """Return a str itself for a subclass of it (numpy's, an HTML parser's); a BrokenRow if it is not valid Unicode."""
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return BrokenRow(INVALID_UTF8)
    return text


def load_hook(name: str) -> Callable[[dict[str, Any]], Any]:
    """Import `module:function`; modules in the current folder are found too.

    Raises:
        UserError: no such module or function, a syntax error, or an exception raised by the module.
    """
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        hook: Callable[[dict[str, Any]], Any] = getattr(importlib.import_module(module_name), function_name)
    except SyntaxError as error:
        raise UserError(f"hook {name!r}: {error.filename}, line {error.lineno}: {error.msg}; fix it") from error
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"hook {name!r}: {error}; give module:function of a module that can be imported from {os.getcwd()}"
        ) from error
    except BaseException as error:  # a user's module may raise anything, SystemExit too
        if _is_ctrl_c(error):
            raise
        raise UserError(f"hook {name!r}: its module raised {_shown(error)}; fix it") from error
    if not callable(hook):
        raise UserError(f"hook {name!r}: is a {type(hook).__name__}, expected a function")
    return hook


def source_identity(config: SourceConfig) -> dict[str, Any]:
    """Return the settings that, with the files' content, decide a source's documents, with digests of its hooks.

    Raises:
        UserError: a hook or the source's tokenizer cannot be loaded.
    """
    hooks = {hook: _hook_identity(getattr(config, hook)) for hook in ("filter", "transform")}
    identity = config.model_dump(exclude={"paths", "tokenizer"}) | hooks
    if config.tokenizer is not None:
        identity["tokenizer"] = f"{config.tokenizer} (sha256 {named_tokenizer(config.tokenizer).sha256[:16]})"
    return identity


def recipe_identity(config: PrepConfig) -> dict[str, Any]:
    """Return the settings that decide the output: a manifest records them, and during a build they must not change.

    Raises:
        UserError: a hook cannot be loaded, or an evaluation file cannot be read.
    """
    sources = {name: source_identity(source) for name, source in sorted(config.sources.items())}
    identity = config.model_dump(exclude={*NOT_DECIDING, "decontaminate"}) | {"sources": sources}
    if config.decontaminate is not None:
        identity["decontaminate"] = {"ngram": config.decontaminate.ngram, "files": _content(config.decontaminate.files)}
    return config.with_interpolations(identity)


def _content(paths: list[str]) -> str:
    """Return a digest of the content of evaluation files, which does not depend on their place or time."""
    digests = sorted(content_digest(file) for file in find_files("decontaminate", paths))
    return f"{len(digests)} (sha256 {hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]})"


def _hook_identity(name: str | None) -> str | None:
    """Return the hook's name and a digest of its module and helpers, since an edited hook yields other documents."""
    if name is None:
        return None
    load_hook(name)
    return f"{name} (sha256 {code_digest(name.partition(':')[0])[:16]})"
