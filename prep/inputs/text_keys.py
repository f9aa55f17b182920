"""An early check of JSON sources: without it, a wrong key of one is found when all others have been tokenized."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from prep.config import SourceConfig
from prep.inputs.faults import InputError
from prep.inputs.files import INDEX_SUFFIX, InputFile, Part
from prep.inputs.json_lines import read_json
from streaming_rwkv.config import UserError
from streaming_rwkv.console import shown

_FILES = 4
_RECORDS = 2_000  # of each file
_KEYS_SHOWN = 12
_READ_WHOLE = "unused:unused"  # a transform, so that whole records are returned; it is never called


def check_text_keys(sources: Mapping[str, SourceConfig], files: Mapping[str, Sequence[InputFile]]) -> None:
    """Check that the first records of each JSON source have the key of the text.

    Files that are broken are left to the readers, which say what is wrong with them. Parquet files are checked when
    units are planned; ids have no keys.

    Raises:
        UserError: none of the records has the key; the keys that there are are named.
    """
    for source, config in sources.items():
        lines = [file for file in files[source] if file.suffix not in (".parquet", INDEX_SUFFIX)]
        if config.transform is None and lines:
            _check_source(source, config, lines)


def _check_source(source: str, config: SourceConfig, files: Sequence[InputFile]) -> None:
    keys: Counter[str] = Counter()
    records = 0
    for file in files[:: -(-len(files) // _FILES)]:
        for record in _first_records(file, config):
            if config.text in record:
                return
            records += 1
            keys.update(map(str, record))
    if not records:
        return
    found = [key for key, _ in keys.most_common(_KEYS_SHOWN)]
    there = ", ".join(repr(key) for key in found) if found else "none"
    raise UserError(
        f"sources.{source}: no {config.text!r} in the first {records:,} records of {files[0].path}; their keys are "
        f"{shown(there)}; name the right key with `sources.{source}.text`, or remove the source"
    )


def _first_records(file: InputFile, config: SourceConfig) -> list[dict[str, object]]:
    whole = config.model_copy(update={"filter": None, "transform": _READ_WHOLE})
    try:
        batches = itertools.islice(read_json(Part(file=file), whole), 8)
        values = itertools.chain.from_iterable(values for _, values, _, _ in batches)
        return [value for value in itertools.islice(values, _RECORDS) if isinstance(value, dict)]
    except InputError:
        return []
