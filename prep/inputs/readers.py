"""Readers: units of work to documents, in chunks of bounded size, so that memory does not grow with the unit."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.config import SourceConfig
from prep.document import Documents, LineCounts, Rejection, add_counts, document_keys
from prep.inputs.faults import BrokenRow, missing_text
from prep.inputs.files import INDEX_SUFFIX, InputFile, Part, Unit
from prep.inputs.hooks import Hooks
from prep.inputs.json_lines import check_lines, read_json
from prep.inputs.parquet import read_parquet
from prep.inputs.token_ids import named_tokenizer, read_ids
from streaming_rwkv.config import UserError
from streaming_rwkv.tokenizer import Tokenizer

CHUNK_CHARACTERS = 4 << 20
CHUNK_DOCUMENTS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows of one file."""

    file: InputFile
    rows: NDArray[np.int64]  # (N,) the row of each text
    texts: list[str]
    rejections: list[Rejection]
    not_objects: int = 0  # the number of rejections that are lines without a JSON object
    input_bytes: int = 0  # about the part of the file that the rows take

    @property
    def line_counts(self) -> LineCounts:
        return LineCounts(len(self.texts) + len(self.rejections), self.not_objects)

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


def read_unit(unit: Unit, config: SourceConfig, *, tokenizer: Tokenizer | None = None) -> Iterator[Documents]:
    """Read a unit's documents, in order and in chunks.

    Args:
        tokenizer: decodes ids in a source that names no tokenizer of its own.

    Raises:
        InputError: a file is broken, or a hook fails.
    """
    pending: list[Batch] = []
    characters = documents = 0
    for batch in itertools.chain.from_iterable(read_part(part, config, tokenizer=tokenizer) for part in unit.parts):
        pending.append(batch)
        characters += batch.characters
        documents += len(batch.texts) + len(batch.rejections)
        if characters >= CHUNK_CHARACTERS or documents >= CHUNK_DOCUMENTS:
            yield _documents(pending)
            pending, characters, documents = [], 0, 0
    if pending:
        yield _documents(pending)


def read_part(part: Part, config: SourceConfig, *, tokenizer: Tokenizer | None = None) -> Iterator[Batch]:
    """Read a part's documents, in order.

    Raises:
        InputError: the file is broken, or a hook fails on it; if the part is the whole file, it is not JSON lines.
    """
    file = part.file
    hooks = Hooks(config, file) if config.has_hooks else None
    for rows, values, not_objects, input_bytes in read_rows(part, config, tokenizer=tokenizer):
        texts = values if hooks is None else hooks.apply(values, rows=rows)
        batch = _batch(file, rows, texts, text=config.text)
        yield replace(batch, not_objects=not_objects, input_bytes=input_bytes)


def read_rows(
    part: Part, config: SourceConfig, *, tokenizer: Tokenizer | None = None
) -> Iterator[tuple[NDArray[np.int64], list[Any], int, int]]:
    """Read a part's rows: texts, or whole records if the source has hooks.

    With them come the number of lines that are not JSON objects, and that of the bytes of input that were read; the
    bytes of ids are not counted as they are read.

    Raises:
        InputError: the file is broken.
    """
    if part.file.suffix == ".parquet":
        for rows, values, text_bytes in read_parquet(part, config):  # by which its units are weighed
            yield rows, values, 0, text_bytes
    elif part.file.suffix == INDEX_SUFFIX:
        of_ids = named_tokenizer(config.tokenizer) if config.tokenizer else tokenizer
        if of_ids is None:
            raise UserError(
                f"{part.file.path}: holds ids; name the tokenizer that made them with "
                f"`sources.{part.file.source}.tokenizer`, e.g. rwkv-world"
            )
        for rows, texts in read_ids(part, of_ids):
            yield rows, [_record(text, config) for text in texts] if config.has_hooks else texts, 0, 0
    else:
        yield from read_json(part, config)


def _record(text: str | BrokenRow, config: SourceConfig) -> Any:
    return text if isinstance(text, BrokenRow) else {config.text: text}


def _batch(file: InputFile, rows: NDArray[np.int64], values: list[Any], *, text: str) -> Batch:
    if set(map(type, values)) <= {str}:
        return Batch(file=file, rows=rows, texts=values, rejections=[])
    rejections = [
        Rejection(
            source=file.source,
            file=file.name,
            row=row,
            reason=_reason(value, text),
            is_requested=isinstance(value, BrokenRow) and value.is_requested,
        )
        for row, value in zip(rows.tolist(), values, strict=True)
        if type(value) is not str
    ]
    is_text = np.fromiter((type(value) is str for value in values), np.bool_, count=len(values))
    return Batch(
        file=file, rows=rows[is_text], texts=[value for value in values if type(value) is str], rejections=rejections
    )


def _reason(value: Any, text: str) -> str:
    if isinstance(value, BrokenRow):
        return value.reason
    return f"{text!r} is null" if value is None else f"{text!r} is not a string"


def _documents(batches: list[Batch]) -> Documents:
    return Documents(
        source=batches[0].file.source,
        texts=list(itertools.chain.from_iterable(batch.texts for batch in batches)),
        keys=np.concatenate([document_keys(batch.file.source, batch.file.key_name, batch.rows) for batch in batches]),
        rows=np.concatenate([batch.rows for batch in batches]),
        files=[batch.file.name for batch in batches],
        file_of=np.repeat(np.arange(len(batches)), [len(batch.texts) for batch in batches]),
        rejections=list(itertools.chain.from_iterable(batch.rejections for batch in batches)),
        line_counts=add_counts((batch.file.name, batch.line_counts) for batch in batches),
        input_bytes=sum(batch.input_bytes for batch in batches),
    )


class CutFiles:
    """Check of files that are read in several parts: they must be JSON lines, counted over all parts of a file."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self._remaining = Counter(part.file for unit in units for part in unit.parts if part.is_cut)
        self._counts: dict[InputFile, LineCounts] = {}

    def has_read(self, unit: Unit, line_counts: Mapping[str, LineCounts]) -> None:
        """Record a unit that was read to its end, and check the files that it completes.

        Args:
            line_counts: the counts of the unit's parts of such files, by file name.

        Raises:
            InputError: a file is not JSON lines.
        """
        cut = [part.file for part in unit.parts if part.is_cut]
        for file in dict.fromkeys(cut):
            before, more = self._counts.get(file, LineCounts(0, 0)), line_counts.get(file.name, LineCounts(0, 0))
            self._counts[file] = before.plus(more)
        for file in cut:
            self._remaining[file] -= 1
            if not self._remaining[file]:
                check_lines(file, self._counts.pop(file))


def nothing_in(source: str, config: SourceConfig, *, rejected: Mapping[str, int]) -> UserError:
    """Return the error for a source without any usable document; `rejected` has counts by reason."""
    why = "; rejected: " + ", ".join(f"{count} ({reason})" for reason, count in rejected.items()) if rejected else ""
    if missing_text(config.text) in rejected:
        remedy = f"name the right key with `sources.{source}.text`"
    else:
        remedy = "fix what the reasons name" if rejected else "fix the files"
    return UserError(f"sources.{source}: no document in {', '.join(config.paths)}{why}; {remedy} or remove the source")
