"""The build context: what every task of a build knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prep.config import PrepConfig
from prep.inputs.files import Unit
from prep.ngrams import Evaluation
from streaming_rwkv.shards import SPLITS, TOKENIZER_FOLDER, Split, bucket_bounds, token_dtype
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer

UNITS_FOLDER = "units"
_MOST_AUDITED_UNITS = 4096  # approximately; auditing them takes two minutes


def unit_task(unit: Unit) -> str:
    """Return the name of the task that tokenizes a unit."""
    return f"{UNITS_FOLDER}/{unit.name}"


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Configuration, units, streams and tokenizer of one build.

    It is pickled once for each worker, without the tokenizer, which each worker loads by itself.
    """

    config: PrepConfig
    units: tuple[Unit, ...]
    vocab_size: int
    recipe: dict[str, Any] = field(default_factory=dict)
    """The settings that decide the output, for the manifest; workers do not have them."""
    loaded_tokenizer: Tokenizer | None = None
    evaluation: Evaluation | None = None
    """Texts that documents must not contain."""
    by_reference: bool = False
    """Encode with the library that defines the ids: the fast tokenizer was found to differ from it."""

    @property
    def folder(self) -> Path:
        """The local folder in which the data set is put together."""
        return self.config.folder

    @property
    def work_folder(self) -> Path:
        return self.config.work_folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the main process, or the data set's own copy: another machine may have no other."""
        tokenizer = self.loaded_tokenizer or load_tokenizer(self.folder / TOKENIZER_FOLDER)
        if self.by_reference:
            tokenizer.use_reference()
        return tokenizer

    @property
    def token_dtype(self) -> Any:
        return token_dtype(self.vocab_size)

    @property
    def streams(self) -> list[tuple[Split, int, int]]:
        """(split, lower, upper) of a source's streams; blocks refer to a stream by its index in this list."""
        return [(split, lower, upper) for split in SPLITS for lower, upper in bucket_bounds(self.config.edges)]

    def audit_bytes(self, unit: Unit) -> int:
        """Return the bytes of a unit's text to compare with the reference: 0 for most units of a large corpus.

        Only the main process compares them, whatever the number of workers.
        """
        each = -(-len(self.units) // _MOST_AUDITED_UNITS)
        return self.config.audit_bytes if int(unit.name, 16) % each == 0 else 0

    def __getstate__(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "units": self.units,
            "vocab_size": self.vocab_size,
            "evaluation": self.evaluation,
            "by_reference": self.by_reference,
        }
