"""Names of the files of a data set, besides those of the on-disk contract."""

from __future__ import annotations

import re

from streaming_rwkv.shards import INDEX_NAME, SPLITS, TOKENIZER_FOLDER
from streaming_rwkv.tokenizer import SAVED_FILES

REJECTED_NAME = "rejected.jsonl"
STATISTICS_NAME = "statistics.json"
REPORT_NAME = "report"  # report.html and report.json
REPORT_FILES = tuple(f"{REPORT_NAME}.{ending}" for ending in ("html", "json"))

_TOKENIZER_FILES = sorted(set().union(*SAVED_FILES.values()))
_FILE_OF_DATA_SET = re.compile(
    rf"({'|'.join(SPLITS)})/[^/]+/\d+-\d+/({re.escape(INDEX_NAME)}|shard\.\d+\.mds\.zstd)|"
    rf"{TOKENIZER_FOLDER}/({'|'.join(map(re.escape, _TOKENIZER_FILES))})|"
    rf"{re.escape(STATISTICS_NAME)}|{re.escape(REJECTED_NAME)}"
)


def shard_name(number: int) -> str:
    """Return the file name of a shard, by its number in its folder."""
    return f"shard.{number:05}.mds.zstd"


def belongs_to_data_set(name: str) -> bool:
    """Return whether a data set can have a file of that name, the manifest aside."""
    return _FILE_OF_DATA_SET.fullmatch(name) is not None
