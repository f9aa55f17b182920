"""Mutated files of every format that is read: only a UserError may leave the program, in bounded memory.

    python -m tests.fuzz --count 10000                 # each format; a case that escapes is shown with its number
    python -m tests.fuzz manifest weights --count 500
    python -m tests.fuzz manifest --case 17            # one case again, with its traceback

Case n of a format is the same on every machine. `tests/test_fuzz.py` runs the first of each.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import io
import json
import logging
import lzma
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import zstandard

from prep.config import PrepConfig, SourceConfig
from prep.dataset.shard_writer import ShardFormat, index_bytes, write_shards
from prep.inputs.readers import read_unit
from prep.inputs.units import plan_units
from streaming_rwkv.config import UserError, load_config
from streaming_rwkv.shards import FORMAT, INDEX_NAME, MANIFEST_NAME, Manifest, StreamRecord, columns, stream_path
from streaming_rwkv.tokenizer import load_tokenizer
from tests.mutations import as_json, mutated_bytes, mutated_json, mutated_value
from tests.small_data import PACK_TOKENS, VOCAB_SIZE, pack_of, save_tokenizer
from tests.source_counts import counts_of

ROOT = Path(__file__).parents[1]
MEMORY_BYTES = 3 << 30  # that a case may take beside what the process has
Case = Callable[[random.Random], Any]
FORMATS: dict[str, Callable[[Path], Case]] = {}


def fuzzed(prepare: Callable[[Path], Case]) -> Callable[[Path], Case]:
    """Register a function that writes valid files to a folder and returns the case that mutates and reads them."""
    FORMATS[prepare.__name__] = prepare
    return prepare


# --- data sets ---


@dataclass(kw_only=True)
class SmallSet:
    """A data set of two streams, whose parts can be replaced with the hashes above them."""

    folder: Path
    manifest: Manifest = field(init=False)

    form = ShardFormat(columns=columns(VOCAB_SIZE), compression_level=1, shard_bytes=2000)

    def __post_init__(self) -> None:
        streams = [self._stream("web", 0), self._stream("code", 1)]
        self.manifest = Manifest(
            format=FORMAT,
            pack_tokens=PACK_TOKENS,
            edges=[16],
            tokenizer=save_tokenizer(self.folder / "tokenizer"),
            config={"seed": 17},
            counts=counts_of(streams),
            streams=streams,
        )
        statistics = {
            "lengths_per_doubling": 4,
            "fill_bins": 4,
            "sources": {
                "web": {"text_bytes": 90, "lengths": {"7": 3, "9": 1}},
                "code": {"text_bytes": 1, "lengths": {}},
            },
            "fill": {"train/web/1-16": [0, 1, 2, 3], "train/code/1-16": [0, 0, 0, 6]},
        }
        (self.folder / "statistics.json").write_text(json.dumps(statistics))
        self.restore()

    def _stream(self, source: str, number: int) -> StreamRecord:
        packs = [pack_of(number, i, lower=1, upper=16) for i in range(6)]
        folder = self.folder / stream_path("train", source, "1-16")
        folder.mkdir(parents=True)
        shards = write_shards(packs, folder, form=self.form)
        (folder / INDEX_NAME).write_bytes(content := index_bytes(shards, form=self.form))
        return StreamRecord(
            split="train", source=source, lower=1, upper=16, documents=sum(len(pack["lengths"]) for pack in packs),
            pieces=sum(len(pack["lengths"]) for pack in packs),
            targets=sum(len(pack["tokens"]) - len(pack["lengths"]) for pack in packs),
            bytes=sum(int(pack["bytes"].sum()) for pack in packs), packs=len(packs),
            index_sha256=hashlib.sha256(content).hexdigest(), shards=shards,
        )  # fmt: skip

    @property
    def shard(self) -> Path:
        return self.folder / self.manifest.streams[0].path / self.manifest.streams[0].shards[0].basename

    def restore(self, manifest: bytes | None = None) -> None:
        (self.folder / MANIFEST_NAME).write_bytes(self.manifest.to_json() if manifest is None else manifest)

    def replace_index(self, content: bytes, **changes: Any) -> None:
        """Replace the first stream's index, and its hash in the manifest."""
        values = json.loads(self.manifest.to_json())
        values["streams"][0] |= {"index_sha256": hashlib.sha256(content).hexdigest(), **changes}
        (self.folder / self.manifest.streams[0].path / INDEX_NAME).write_bytes(content)
        self.restore(json.dumps(values).encode())

    def replace_shard(self, compressed: bytes, raw: bytes, **changes: Any) -> None:
        """Replace the first shard, and all sizes and hashes of it."""
        stream = self.manifest.streams[0]
        self.shard.write_bytes(compressed)
        record = stream.shards[0].model_copy(
            update={
                "bytes": len(compressed), "sha256": hashlib.sha256(compressed).hexdigest(),
                "raw_bytes": len(raw), "raw_sha256": hashlib.sha256(raw).hexdigest(),
            }
        )  # fmt: skip
        shards = [record, *stream.shards[1:]]
        content = index_bytes(shards, form=self.form)
        self.replace_index(content, shards=[shard.model_dump() for shard in shards], **changes)


def mutated_shard(compressed: bytes, raw: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    """Return a shard, compressed and not, with a wrong frame, wrong bytes, or wrong numbers in its head or columns."""
    match rng.randrange(6):
        case 0:
            return mutated_bytes(compressed, rng), raw
        case 1:
            skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
            return rng.choice(
                [compressed + b"more", skippable + compressed, compressed * 2, compressed + skippable]
            ), raw
        case 2:
            changed = mutated_bytes(raw, rng)
        case 3:  # settings of another length: all offsets move with them
            packs = int.from_bytes(raw[:4], "little")
            bounds = np.frombuffer(raw, np.uint32, packs + 1, offset=4)
            begin = 4 + bounds.nbytes
            settings = mutated_json(json.loads(raw[begin : bounds[0]]), rng)
            moved = (bounds.astype(np.int64) + len(settings) - (int(bounds[0]) - begin)).astype(np.uint32)
            changed = raw[:4] + moved.tobytes() + settings + raw[bounds[0] :]
        case _:  # a number of the head, or of a column
            at = 4 * rng.randrange(max(1, len(raw) // 4 if rng.random() < 0.5 else 12))
            number = rng.choice((0, 1, 2, 96, 97, 255, 65_535, 1 << 31, (1 << 32) - 1, rng.randrange(1 << 32)))
            changed = raw[:at] + number.to_bytes(4, "little") + raw[at + 4 :]
    return zstandard.ZstdCompressor().compress(changed), changed


@fuzzed
def manifest(folder: Path) -> Case:
    from prep.commands.report import write_report
    from prep.dataset.verification import verify

    data = SmallSet(folder=folder / "data")
    values = json.loads(data.manifest.to_json())

    def case(rng: random.Random) -> Any:
        data.restore(mutated_json(values, rng))
        found = verify(data.folder)
        write_report(data.folder, to=folder / "report")
        return found.fingerprint

    return case


@fuzzed
def index(folder: Path) -> Case:
    from prep.dataset.verification import verify

    data = SmallSet(folder=folder / "data")
    values = json.loads((data.shard.parent / INDEX_NAME).read_bytes())

    def case(rng: random.Random) -> Any:
        data.replace_index(mutated_json(values, rng))
        return verify(data.folder)

    return case


@fuzzed
def shard(folder: Path) -> Case:
    from prep.commands.inspection import shown_pieces
    from prep.dataset.finished import open_data_set
    from prep.dataset.verification import verify

    data = SmallSet(folder=folder / "data")
    compressed = data.shard.read_bytes()
    raw = zstandard.ZstdDecompressor().decompress(compressed)

    def case(rng: random.Random) -> Any:
        data.replace_shard(*mutated_shard(compressed, raw, rng))
        with open_data_set(data.folder) as opened:
            for _ in shown_pieces(opened, opened.manifest(), opened.manifest().streams[:1]):
                pass
        return verify(data.folder)

    return case


@fuzzed
def statistics(folder: Path) -> Case:
    from prep.commands.report import write_report

    data = SmallSet(folder=folder / "data")
    values = json.loads((data.folder / "statistics.json").read_text())

    def case(rng: random.Random) -> Any:
        (data.folder / "statistics.json").write_bytes(mutated_json(values, rng))
        return write_report(data.folder, to=folder / "report")

    return case


# --- tokenizers ---

_TEXT = "Hello, 床前 w1 <|end|>\n \x00é"


def _use_tokenizer(folder: Path, to: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    tokenizer.load()
    ids = tokenizer.encode_batch([_TEXT, ""]).ids
    tokenizer.encode_reference([_TEXT])
    tokenizer.save(to)
    return tokenizer.decode(ids), "".join(tokenizer.decode_stream(ids.tolist())), tokenizer.token_bytes.sum()


@fuzzed
def tokenizer(folder: Path) -> Case:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {character: i for i, character in enumerate(alphabet)} | {"He": 256, "ll": 257, "<|end|>": 258}
    made = Tokenizer(models.BPE(vocab=names, merges=[("H", "e"), ("l", "l")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    files = {
        "tokenizer.json": json.loads(made.to_str()),
        "tokenizer_config.json": {"eos_token": "<|end|>", "bos_token": {"content": "<|end|>", "lstrip": False}},
        "special_tokens_map.json": {"eos_token": "<|end|>"},
    }
    (folder / "tokenizer").mkdir()
    definition = files["tokenizer.json"]

    def case(rng: random.Random) -> Any:
        chosen = rng.choice(["tokenizer.json"] * 4 + list(files))
        for name, values in files.items():
            if name != chosen:
                content = as_json(values).encode()
            elif name == "tokenizer.json" and rng.random() < 0.5:  # a part other than the 256 tokens
                part = rng.choice(["added_tokens", "pre_tokenizer", "decoder", "normalizer", "post_processor"])
                content = as_json(values | {part: mutated_value(definition[part] or {"type": "NFC"}, rng)}).encode()
            else:
                content = mutated_json(values, rng)
            (folder / "tokenizer" / name).write_bytes(content)
        return _use_tokenizer(folder / "tokenizer", folder / "saved")

    return case


@fuzzed
def world(folder: Path) -> Case:
    tokens: list[bytes] = [*(bytes([byte]) for byte in range(256)), b"Hello", "床前".encode(), b"\xe5\xba"]
    lines = []
    for number, token in enumerate(tokens, 1):
        try:
            literal = repr(token.decode())
        except UnicodeDecodeError:
            literal = repr(token)
        lines.append(f"{number} {literal} {len(token)}")
    (folder / "world").mkdir()

    def case(rng: random.Random) -> Any:
        changed = list(lines)
        at = rng.randrange(len(lines))
        match rng.randrange(5):
            case 0:
                content = mutated_bytes("\n".join(changed).encode(), rng)
            case 1:
                content = "\n".join(changed[:at]).encode()
            case 2:
                changed[at] = rng.choice(
                    [*lines, "", " ", "0 'x' 1", "-1 'x' 1", "70000 'x' 1", "5 __import__('os') 1"]
                )
                content = "\n".join(changed).encode()
            case 3:
                parts = changed[at].split(" ")
                parts[rng.randrange(len(parts))] = rng.choice(
                    ["", "0", "-1", "1e9", "'", "b''", "(" * 5_000, "9" * 5_000]
                )
                changed[at] = " ".join(parts)
                content = "\n".join(changed).encode()
            case _:
                changed[at] = mutated_bytes(changed[at].encode(), rng).decode(errors="replace")
                content = "\n".join(changed).encode()
        (folder / "world" / "rwkv_vocab_v20230424.txt").write_bytes(content)
        return _use_tokenizer(folder / "world", folder / "saved")

    return case


# --- inputs and settings ---

_RECIPE = {
    "out": "data", "tokenizer": "rwkv-world", "sources": {"web": {"paths": ["a.jsonl", "b/*.parquet"], "text": "text"}},
    "edges": [256, 512], "pack_tokens": 1024, "validation": 0.05, "seed": 3, "long_documents": "split", "workers": 2,
    "work": None, "shard_bytes": 1 << 20,
}  # fmt: skip


def _load_yaml(config_type: Any, values: Any, folder: Path, rng: random.Random) -> Any:
    overrides = []
    if rng.random() < 0.3:
        key = rng.choice(
            [*values, "sources.web.paths.0", "data.stages.0.tokens", "data.stages", "x..y", "", "a.0.b", "["]
        )
        value = rng.choice(
            ["1", "", "[", "{a: 1}", "null", "${oc.env:HOME}", "${x}", "é\0", "-", "9" * 5_000, "[" * 3_000]
        )
        overrides = [f"{key}={value}"]
    mutated = mutated_value(values, rng)
    match rng.randrange(4):
        case 0:
            content = mutated_bytes(yaml.safe_dump(values).encode(), rng)
        case 1:
            content = as_json(mutated).encode()  # JSON is YAML
        case _:
            content = yaml.safe_dump(mutated).encode(errors="replace")
    (folder / "a.yaml").write_bytes(content)
    return load_config(config_type, folder / "a.yaml", overrides=overrides)


@fuzzed
def recipe(folder: Path) -> Case:
    return lambda rng: _load_yaml(PrepConfig, _RECIPE, folder, rng).with_interpolations(_RECIPE)


@fuzzed
def settings(folder: Path) -> Case:
    from streaming_rwkv.train.config import RunConfig

    values = yaml.safe_load((ROOT / "yamls" / "stage2.yaml").read_text())
    load_config(RunConfig, ROOT / "yamls" / "stage2.yaml")  # imports all that it needs
    return lambda rng: _load_yaml(RunConfig, values, folder, rng).to_yaml()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), written, row_group_size=2)
    return written.getvalue()


@fuzzed
def inputs(folder: Path) -> Case:
    rows = [{"text": text, "id": number} for number, text in enumerate(["one", "床前明月光", "", "four\n", "x" * 300])]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    array = json.dumps(rows).encode()
    compressors = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    compressors[".zst"] = zstandard.ZstdCompressor().compress

    def case(rng: random.Random) -> Any:
        place = folder / "input"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        ending, compression = rng.choice([".jsonl", ".json", ".parquet"]), rng.choice(list(compressors))
        if ending == ".parquet":
            compression, content = "", mutated_bytes(_parquet(rows), rng)
        elif rng.random() < 0.5:  # within the compressed text
            plain = array if ending == ".json" and rng.random() < 0.5 else lines
            content = rng.choice([mutated_bytes(plain, rng), mutated_json(rows, rng), mutated_json(rows[0], rng)])
            content = compressors[compression](content)
        else:
            content = mutated_bytes(compressors[compression](lines), rng)
        (place / f"a{ending}{compression}").write_bytes(content)
        values = {"out": str(folder / "out"), "tokenizer": "rwkv-world", "sources": {"web": {"paths": [str(place)]}}}
        config = PrepConfig.model_validate(values)
        units = plan_units(config.sources, unit_bytes=rng.choice([40, 1 << 20]))
        return sum(len(chunk.texts) for unit in units for chunk in read_unit(unit, config.sources["web"]))

    return case


@fuzzed
def token_ids(folder: Path) -> Case:
    documents = [[300, 301, 0], [0], [302, 303, 304, 0], [305, 0]]
    index, ids = _binidx(documents)
    (folder / "ids").mkdir()

    def case(rng: random.Random) -> Any:
        is_index = rng.random() < 0.7
        (folder / "ids" / "a.idx").write_bytes(mutated_bytes(index, rng) if is_index else index)
        (folder / "ids" / "a.bin").write_bytes(ids if is_index else mutated_bytes(ids, rng))
        source = SourceConfig(paths=[str(folder / "ids" / "a.idx")], tokenizer="rwkv-world")
        units = plan_units({"web": source}, unit_bytes=rng.choice([5, 1 << 20]))
        return sum(len(chunk.texts) for unit in units for chunk in read_unit(unit, source))

    return case


def _binidx(documents: list[list[int]]) -> tuple[bytes, bytes]:
    sizes = np.array([*map(len, documents)], "<i4")
    pointers = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype("<i8") * 2
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(sizes) + 1)
    index = header + sizes.tobytes() + pointers.tobytes() + np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    return index, np.concatenate(documents).astype("<u2").tobytes()


# --- runs ---


@fuzzed
def metrics(folder: Path) -> Case:
    from streaming_rwkv.plotting.page import plot_page
    from streaming_rwkv.plotting.panels import consecutive, overlaid
    from streaming_rwkv.plotting.runs import History, read_run
    from streaming_rwkv.plotting.tables import differences, last_validation, summary
    from streaming_rwkv.train.callbacks.json_lines import forget_lines_after

    rows = [
        {"step": step, "time/token": 100 * step, "loss/train/total": 3.0, "optimizer/lr": 0.1, "stage": 1.0 + step // 3,
         "throughput/tokens_per_second": 5.0, "share/web/1-16": 0.25, "share/code/17-32": 0.75,
         "validation/loss/all": 2.0, "validation/loss/source/web": 2.0, "validation/loss/bucket/1-16": 2.0,
         "validation/bits_per_byte/all": 1.0}
        for step in range(1, 6)
    ]  # fmt: skip
    path = folder / "metrics.jsonl"

    def case(rng: random.Random) -> Any:
        lines = [as_json(row).encode() for row in rows]
        at = rng.randrange(len(lines))
        lines[at] = mutated_json(rows[at], rng)
        content = b"\n".join([*lines, b""])
        path.write_bytes(mutated_bytes(content, rng) if rng.random() < 0.2 else content)
        try:
            run = read_run(folder)
            history = History(runs=[run])
            tables = [("", summary(history)), ("", last_validation(run) or [[]]), ("", differences([run, run]))]
            for plot in (consecutive(history), overlaid([run, run])):
                plot_page(plot, about="", before=tables, after=[])
            if rng.random() < 0.02:
                from streaming_rwkv.plot import write_plot

                write_plot([folder], to=folder / "plot.png")
        finally:
            forget_lines_after(path, 3)

    return case


@fuzzed
def mark(folder: Path) -> Case:
    from streaming_rwkv.model.marked_files import read_files
    from streaming_rwkv.train.checkpoints.local import LocalCheckpoints
    from streaming_rwkv.train.checkpoints.restore import check_same_settings

    run = {"data": "1" * 64, "tokenizer": "2" * 64, "mixture": [{"tokens": 5}], "batch_packs": 2, "order": {"seed": 1},
           "model": {"hidden_size": 64}, "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}}  # fmt: skip
    values = {
        "format": "streaming-rwkv-checkpoint/2", "step": 3, "tokens": 9, "samples": 6, "slots": 6, "seconds": 1.5,
        "steps_skipped": 0, "consumed": {"web/1-16": 9.0}, "not_logged": {"web/1-16": [8.0, 4.0]},
        "run": run,
        "files": {".metadata": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}},
    }  # fmt: skip
    place = folder / "checkpoints" / "step-00000003"
    place.mkdir(parents=True)
    (place / ".metadata").write_bytes(b"x")

    def case(rng: random.Random) -> Any:
        (place / "complete.json").write_bytes(mutated_json(values, rng))
        read_files(place)
        found = LocalCheckpoints(place.parent).find(3)
        assert found.mark.slots_used >= 0
        return check_same_settings(found.mark, run, allow=frozenset(), where="here")

    return case


def _small_model() -> Any:
    import torch

    from streaming_rwkv.model.config import RWKV7Config
    from streaming_rwkv.model.rwkv7 import RWKV7

    shape = {"vocab_size": 8, "hidden_size": 64, "num_layers": 2, "ffn_size": 64}
    ranks = dict.fromkeys(("decay_rank", "a_rank", "v_rank", "gate_rank"), 8)
    model = RWKV7(RWKV7Config(**shape, **ranks))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def _mutated_state(state: dict[str, Any], rng: random.Random) -> Any:
    """Return weights with another name, shape, type or layout."""
    import torch

    changed: dict[Any, Any] = dict(state)
    name = rng.choice(list(changed))
    value = changed[name]
    odd = [
        None, 3, "x", [value], {}, value.int(), value[..., :0], value[None], value.flatten(), value.to_sparse(),
        torch.zeros(()), torch.full_like(value, float("nan")), torch.zeros(1).expand(1 << 20, 1 << 12),
        value.double() * 1e300, torch.zeros(7), value.to(torch.complex64), torch.zeros(4, dtype=torch.int8),
        value.to("meta"),
    ]  # fmt: skip
    match rng.randrange(5):
        case 0:
            del changed[name]
        case 1:
            new = re.sub(r"\d", str(rng.choice([2, 7, 10**8, 10**30])), name) if "blocks" in name else f"x.{name}"
            changed[rng.choice([new, name.upper(), "", 5, f"model.{name}"])] = changed.pop(name)
        case 2:
            changed = {rng.choice(["state", "model", "module", "x"]): changed, "y": rng.choice(odd)}
        case _:
            changed[name] = rng.choice(odd)
    return changed


@fuzzed
def weights(folder: Path) -> Case:
    import torch
    from safetensors.torch import save

    from streaming_rwkv.model.state import model_state
    from streaming_rwkv.model.weights import read_model

    state = model_state(_small_model())
    written = io.BytesIO()
    torch.save(state, written)
    plain, safe = written.getvalue(), save(state)
    size = int.from_bytes(safe[:8], "little")
    header = json.loads(safe[8 : 8 + size])

    def case(rng: random.Random) -> Any:
        name = "a.pth"
        match rng.randrange(5):
            case 0:
                content = mutated_bytes(plain, rng)
            case 1:
                content = mutated_bytes(plain[:4000], rng) + plain[4000:]  # the pickle
            case 2:
                name, content = "a.safetensors", mutated_bytes(safe[:4000], rng) + safe[4000:]
            case 3:
                name, changed = "a.safetensors", mutated_json(header, rng)
                length = rng.choice([len(changed)] * 6 + [0, len(changed) + 1, 1 << 40, (1 << 64) - 1])
                content = length.to_bytes(8, "little") + changed + safe[8 + size :]
            case _:
                written = io.BytesIO()
                torch.save(_mutated_state(state, rng), written)
                content = written.getvalue()
        (folder / name).write_bytes(content)
        return read_model(folder / name)

    return case


@fuzzed
def huggingface(folder: Path) -> Case:
    from streaming_rwkv.model.state import model_state
    from streaming_rwkv.model.weights import read_model, write_huggingface

    place = folder / "model"
    write_huggingface(model_state(_small_model()), place)
    config = json.loads((place / "config.json").read_text())
    listed = {"metadata": {"total_size": 5}, "weight_map": {"model.embeddings.weight": "model.safetensors"}}

    def case(rng: random.Random) -> Any:
        is_config = rng.random() < 0.5
        (place / "config.json").write_bytes(mutated_json(config, rng) if is_config else json.dumps(config).encode())
        index = place / "model.safetensors.index.json"
        index.unlink(missing_ok=True)
        if not is_config:
            index.write_bytes(mutated_json(listed, rng))
        return read_model(place)

    return case


@fuzzed
def sharded(folder: Path) -> Case:
    import pickle

    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

    from streaming_rwkv.inference.average import average
    from streaming_rwkv.model.state import model_state
    from streaming_rwkv.model.weights import read_model

    place = folder / "checkpoint"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_sharded({"model": model_state(_small_model())}, storage_writer=FileSystemWriter(place), no_dist=True)
    (data,) = place.glob("*.distcp")
    files = {path.name: path.read_bytes() for path in (data, place / ".metadata")}

    def mutated_metadata(rng: random.Random) -> bytes:
        metadata = pickle.loads(files[".metadata"])  # it is ours
        places = list(metadata.storage_data.items())
        key, at = rng.choice(places)
        chunk = rng.choice(rng.choice(list(metadata.state_dict_metadata.values())).chunks)
        match rng.randrange(8):
            case 6:
                chunk.offsets = rng.choice([None, (), (-1,), (1 << 62,), "x", (1, 1), (True, 0), 5])
            case 7:
                chunk.sizes = rng.choice([None, (), (-1,), (1 << 62,), "x", (1, 1), (0,), (1.5, 2)])
            case 0:
                at.relative_path = rng.choice(["../x", "/dev/zero", "", ".", None, 5, "x", "x\0", ".metadata"])
            case 1:
                at.offset = rng.choice([-1, 1 << 62, None, "x", 1.5, at.offset + 1, 0])
            case 2:
                at.length = rng.choice([-1, 1 << 62, None, "x", 1.5, 0, 1])
            case 3:
                del metadata.storage_data[key]
            case 4:
                name = rng.choice(list(metadata.state_dict_metadata))
                other = rng.choice([None, 5, *metadata.state_dict_metadata.values()])
                metadata.state_dict_metadata[rng.choice([name, "x", 5])] = other
            case _:
                entry = rng.choice(list(metadata.state_dict_metadata.values()))
                entry.size = rng.choice([None, (1 << 40, 1 << 20), (-1,), "x", [1]])
        return pickle.dumps(metadata)

    def case(rng: random.Random) -> Any:
        for name, content in files.items():
            (place / name).write_bytes(content)
        match rng.randrange(3):
            case 0:
                (place / ".metadata").write_bytes(mutated_bytes(files[".metadata"], rng))
            case 1:
                (place / ".metadata").write_bytes(mutated_metadata(rng))
            case _:
                data.write_bytes(mutated_bytes(files[data.name], rng))
        return read_model(place) if rng.random() < 0.5 else average([place], [1.0])

    return case


# --- running ---


@dataclass(kw_only=True)
class Outcome:
    """The verdicts of some cases."""

    counts: Counter[str] = field(default_factory=Counter)
    escapes: dict[int, str] = field(default_factory=dict)  # by case: what left the program, and where


@contextmanager
def _limited_memory() -> Iterator[None]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run_cases(name: str, folder: Path, *, first: int = 0, count: int) -> Outcome:
    """Run cases first … first + count - 1 of a format."""
    outcome = Outcome()
    case = FORMATS[name](folder)
    for number in range(first, first + count):
        (folder / "case").write_text(f"{name} {number}")  # for a process that dies in it
        try:
            with _limited_memory(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                case(random.Random(f"{name} {number}"))
            outcome.counts["accepted"] += 1
        except UserError as error:
            outcome.counts["refused"] += 1
            if not str(error).strip():
                outcome.escapes[number] = "a UserError without a text"
        except KeyboardInterrupt:  # stopped by hand
            break
        except BaseException as error:  # noqa: BLE001  # a panic of Rust is no Exception
            where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            ours = [place for place in where if "/prep/" in place or "/streaming_rwkv/" in place]
            outcome.escapes[number] = f"{type(error).__name__}: {str(error)[:200]} at {(ours or where)[-1]}"
    return outcome


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Mutate files of every format.")
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FORMATS)}; all by default")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--case", type=int, help="run one case, and show its traceback")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    escaped = False
    for name in options.formats or FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            if options.case is not None:
                print(FORMATS[name](Path(folder))(random.Random(f"{name} {options.case}")))
                continue
            outcome = run_cases(name, Path(folder), first=options.first, count=options.count)
        print(f"{name}: {dict(outcome.counts)}, {len(outcome.escapes)} escaped", flush=True)
        for number, text in list(outcome.escapes.items())[:20]:
            print(f"  case {number}: {text}")
        escaped |= bool(outcome.escapes)
    return int(escaped)


if __name__ == "__main__":
    sys.exit(main())
