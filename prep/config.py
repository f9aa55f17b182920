"""The recipe of a data set: the settings that yamls/prep/NAME.yaml may contain."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import quote

from pydantic import Field, field_validator, model_validator

from streaming_rwkv.config import Config, LoadedConfig
from streaming_rwkv.location import checked_local, checked_location, expand_user, is_remote
from streaming_rwkv.processes import usable_cores
from streaming_rwkv.quantities import ByteCount, Count
from streaming_rwkv.shards import check_source_name
from streaming_rwkv.version import PROGRAM

WORK_FOLDER = ".prep"  # in the folder where this machine writes
# Settings that do not affect the output: locations, the number of processes, checks.
NOT_DECIDING = {"out", "work", "workers", "engine", "on_error", "audit_bytes"}


class SourceConfig(Config):
    """One corpus. Its weight in the mixture is chosen at training time, not here."""

    paths: list[str] = Field(min_length=1)
    """Files, folders (searched at any depth) or globs; local or `s3://bucket/…`."""
    text: str = "text"
    """The column, or JSON key, that holds the text."""
    tokenizer: str | None = None
    """The tokenizer with which the ids of `.bin/.idx` files become text again; by default that of the recipe."""
    filter: str | None = None
    """`module:function(record: dict) -> bool | str | Reject`: False rejects the document, a text is the reason."""
    transform: str | None = None
    """`module:function(record: dict) -> str | None | Reject`: the text to use; None, or `prep.Reject(reason)`, rejects
    the document."""

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path_is_a_list(cls, paths: Any) -> Any:
        return [paths] if isinstance(paths, str) else paths

    @field_validator("paths")
    @classmethod
    def _are_locations(cls, paths: list[str]) -> list[str]:
        return [checked_location(path) for path in paths]

    @field_validator("tokenizer")
    @classmethod
    def _local(cls, path: str | None) -> str | None:
        return None if path is None else checked_local(path)

    @field_validator("filter", "transform")
    @classmethod
    def _module_and_function(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[\w.]+:\w+", name):
            raise ValueError(f"found {name!r}, expected module:function, e.g. my_hooks:keep")
        return name

    @property
    def has_hooks(self) -> bool:
        """True if the source's records are filtered or transformed."""
        return self.filter is not None or self.transform is not None

    @property
    def needs_text(self) -> bool:
        """True if each record must have the key of the text."""
        return self.transform is None


class DecontaminationConfig(Config):
    """Evaluation texts that must not be in the training data."""

    files: list[str] = Field(min_length=1)
    """Files, folders or globs of JSON or parquet, as in `sources.NAME.paths`; all texts of their records count."""
    ngram: int = Field(default=13, ge=1, le=1000)
    """The number of consecutive words, or Chinese characters, that a document must share with an evaluation text."""

    @field_validator("files", mode="before")
    @classmethod
    def _one_path_is_a_list(cls, paths: Any) -> Any:
        return [paths] if isinstance(paths, str) else paths

    @field_validator("files")
    @classmethod
    def _are_locations(cls, paths: list[str]) -> list[str]:
        return [checked_location(path) for path in paths]


class PrepConfig(LoadedConfig):
    """One data set."""

    mistaken_for: ClassVar[tuple[frozenset[str], str]] = (
        frozenset({"save_folder", "data", "model", "optimizer"}),
        f"this is a training YAML, not a recipe of a data set; train with `{PROGRAM} train {{path}}`, or give a recipe "
        "such as yamls/prep/demo.yaml",
    )

    out: str
    """The data set's folder, or s3://bucket/path."""
    work: str | None = None
    """With out=s3://…: the local folder for unfinished work and for shards that are not uploaded yet; by default a
    subfolder of ~/.cache/streaming-rwkv/prep. Resuming an interrupted build needs the same folder; with another one all
    work is repeated."""
    tokenizer: str
    """`rwkv-world`, a folder, a tokenizer.json, or a name on the Hugging Face hub."""
    bos_token: str | None = None
    """The token that begins each document; by default the one that the tokenizer's files name."""
    eos_token: str | None = None
    """The token that ends each document; by default the one that the tokenizer's files name."""
    sources: dict[str, SourceConfig] = Field(min_length=1)
    """Corpora by name; a name becomes part of the shards' paths."""

    edges: list[int] = Field(default=[256, 512, 768, 1024, 1280, 1536, 1792, 2048])
    """The upper length of each bucket, in inputs; documents longer than the largest are cut at it."""
    pack_tokens: Count = Field(default=8192, ge=1, le=1 << 24)
    """The maximum number of inputs in a pack."""
    validation: float = Field(default=0.005, ge=0, lt=1)
    """The fraction of documents in the validation split; a hash of the text selects them."""
    split_seed: int = Field(default=0, ge=0, lt=1 << 64)
    """Random seed that selects the validation documents."""
    seed: int = Field(default=17, ge=0, lt=1 << 64)
    """Random seed of the order in which packs are written."""
    long_documents: Literal["split", "truncate", "drop"] = "split"
    """Treatment of documents longer than the largest edge: cut into pieces, keep the first piece, or reject."""
    deduplicate: Literal["exact", "none"] = "exact"
    """`exact` keeps the first of all documents with equal text, across sources (sources by name, files by path)."""
    decontaminate: DecontaminationConfig | None = None
    """Evaluation texts to keep out: documents that share an n-gram with one are rejected, as `contaminated`."""
    on_error: Literal["skip", "stop"] = "skip"
    """`skip` counts broken documents, `stop` stops at the first. A broken file always stops the build."""

    compression_level: int = Field(default=1, ge=1, le=22)
    """The compression level of zstd. Level 3 makes shards 17 % smaller than level 1 and takes twice the time."""
    shard_bytes: ByteCount = Field(default=72 << 20, ge=1 << 10, lt=1 << 32)
    """The maximum uncompressed size of a shard. The default, '72mb', holds a full window: 2²⁴ tokens of 4 bytes, and
    columns."""
    unit_bytes: ByteCount = Field(default=1 << 23, ge=1)
    """The approximate amount of input in a unit of work; formats that cannot be divided make larger units."""
    window_tokens: Count = Field(default=1 << 24, ge=1)
    """The number of tokens of a bucket that are packed together; bounds the memory of packing."""

    workers: int | None = Field(default=None, ge=1, le=1024)
    """The number of processes; by default one per core."""
    engine: Literal["processes", "ray"] = "processes"
    """Run units of work in processes on this machine, or as Ray tasks."""
    audit_bytes: ByteCount = Field(default=1 << 15, ge=0)
    """Bytes of text per unit that are re-encoded with the reference tokenizer as a check. Above 4,096 units, about
    4,096 of them are sampled."""

    _location = field_validator("out")(checked_location)

    @field_validator("work", "tokenizer")
    @classmethod
    def _local(cls, path: str | None) -> str | None:
        return None if path is None else checked_local(path)

    @field_validator("sources")
    @classmethod
    def _names_are_folders(cls, sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        for name in sources:
            check_source_name(name)
        return sources

    @field_validator("edges")
    @classmethod
    def _edges_rise(cls, edges: list[int]) -> list[int]:
        if not edges or edges[0] < 1 or any(left >= right for left, right in itertools.pairwise(edges)):
            raise ValueError(f"found {edges}, expected increasing lengths such as [256, 512, 1024]")
        return edges

    @model_validator(mode="after")
    def _longest_piece_fits(self) -> PrepConfig:
        if self.edges[-1] > self.pack_tokens:
            raise ValueError(
                f"edges: the largest is {self.edges[-1]}, but a pack holds pack_tokens={self.pack_tokens}; "
                "raise pack_tokens or lower the edge"
            )
        return self

    @model_validator(mode="after")
    def _work_is_for_object_storage(self) -> PrepConfig:
        if self.work is not None and (is_remote(self.work) or not is_remote(self.out)):
            raise ValueError(
                f"work: found {self.work!r} with out={self.out}; expected a local folder, and only with out=s3://…: "
                "otherwise unfinished work is kept in the data set's own folder"
            )
        return self

    @property
    def folder(self) -> Path:
        """The folder to which this machine writes: the data set's, or for one in object storage a local work folder."""
        if not is_remote(self.out):
            return expand_user(self.out)
        if self.work is not None:
            return expand_user(self.work)
        cache = expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        return cache / "streaming-rwkv" / "prep" / quote(self.out.removeprefix("s3://").strip("/"), safe="")

    @property
    def work_folder(self) -> Path:
        return self.folder / WORK_FOLDER

    @property
    def worker_count(self) -> int:
        return self.workers or usable_cores()
