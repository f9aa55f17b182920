"""A corpus in, a data set out: what the contract promises, over whole builds."""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from prep.__main__ import main
from prep.build import build
from prep.commands.dry_run import count
from prep.dataset.shard_reader import read_shard
from prep.dataset.verification import verify
from prep.execution.observer import Observer
from prep.execution.task_store import WorkError
from prep.inputs.faults import InputError
from prep.stages.audit import Audit
from streaming_rwkv.config import UserError
from streaming_rwkv.shards import DataError, Manifest, offsets_of
from streaming_rwkv.tokenizer import HuggingFaceTokenizer, load_tokenizer

LENGTHS = [0, 1, 2, 254, 255, 256, 257, 258, 2046, 2047, 2048, 2049, 2050, 4096, 10_000]


def text_of(tokens: int, *, seed: int) -> str:
    """Return a text of the given number of tokens in the test tokenizer: digits are never merged."""
    return "".join(str(digit) for digit in np.random.default_rng(seed).integers(0, 10, tokens))


HARD = [
    "床前明月光，疑是地上霜。" * 300,
    "🎉👩‍👩‍👧‍👦 e\u0301\u202e " * 200,
    "\x00\x01\x1b[31m\x7f\r\n\t\ufeff",
    "<|endoftext|> spelled out <|endoftext|>",
    "the quick brown fox " * 900,
]


def documents_in(out: Path, manifest: Manifest) -> dict[int, list[dict[str, object]]]:
    """Pieces of every document by its key, in order."""
    found: dict[int, list[dict[str, object]]] = collections.defaultdict(list)
    for stream in manifest.streams:
        for shard in stream.shards:
            for pack in read_shard(out / stream.path / shard.basename, shard):
                bounds = offsets_of(pack["lengths"])
                for piece, (begin, end) in enumerate(itertools.pairwise(bounds)):
                    found[int(pack["keys"][piece])].append(
                        {
                            "start": int(pack["starts"][piece]),
                            "tokens": pack["tokens"][begin:end].tolist(),
                            "bytes": int(pack["bytes"][piece]),
                            "split": stream.split,
                            "bounds": (stream.lower, stream.upper),
                        }
                    )
    return {key: sorted(pieces, key=lambda piece: piece["start"]) for key, pieces in found.items()}


def content(out: Path) -> dict[str, bytes]:
    """Contents of the files of a finished data set."""
    files = [path for path in out.rglob("*") if path.is_file() and ".prep" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.parametrize("tokenizer_name", ["bpe", "rwkv-world"])
def test_every_token_is_a_target_once_with_one_end_per_document(
    config, tokenizer_folder, write_lines, tmp_path, tokenizer_name
):
    texts = [text_of(length, seed=length) for length in LENGTHS] + HARD
    write_lines(tmp_path / "corpus" / "a.jsonl", texts)
    chosen = str(tokenizer_folder) if tokenizer_name == "bpe" else tokenizer_name
    built = build(config(tokenizer=chosen, validation=0.4, split_seed=3)).manifest
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert {stream.split for stream in built.streams} == {"train", "validation"}

    recovered = []
    for pieces in documents_in(tmp_path / "out", built).values():
        targets: list[int] = []
        for piece in pieces:
            lower, upper = piece["bounds"]
            assert lower <= len(piece["tokens"]) - 1 <= upper
            assert piece["start"] == len(targets)  # no gap, no overlap
            previous = tokenizer.bos_id if not targets else targets[-1]
            assert piece["tokens"][0] == previous  # the shared token, or bos
            targets += piece["tokens"][1:]
        assert targets[-1] == tokenizer.eos_id
        assert targets.count(tokenizer.eos_id) == 1
        assert len({piece["split"] for piece in pieces}) == 1
        text = tokenizer.decode(targets)
        assert sum(piece["bytes"] for piece in pieces) == len(text.encode())
        recovered.append(text)
    assert sorted(recovered) == sorted(texts)
    assert built.counts["corpus"].targets_read == sum(len(tokenizer.encode(text)) + 1 for text in texts)


def test_the_same_build_gives_the_same_bytes(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", [text_of(n * 37 % 3000, seed=n) for n in range(60)])
    first = build(config(out=str(tmp_path / "first"), validation=0.1)).manifest
    second = build(config(out=str(tmp_path / "second"), validation=0.1)).manifest
    assert first.fingerprint == second.fingerprint
    assert content(tmp_path / "first") == content(tmp_path / "second")
    assert not list((tmp_path / "first" / ".prep").glob("done"))


def test_another_seed_gives_another_order_of_the_same_packs(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", [text_of(250, seed=n) for n in range(200)])
    orders = []
    for seed in (1, 2):
        built = build(config(out=str(tmp_path / str(seed)), seed=seed, pack_tokens=2048)).manifest
        (stream,) = built.streams
        packs = list(read_shard(tmp_path / str(seed) / stream.path / stream.shards[0].basename, stream.shards[0]))
        orders.append([pack["keys"].tobytes() for pack in packs])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_the_split_does_not_change_when_files_move(config, write_lines, tmp_path):
    texts = [text_of(20, seed=n) for n in range(300)]
    write_lines(tmp_path / "corpus" / "a.jsonl", texts)
    before = build(config(out=str(tmp_path / "before"), validation=0.3)).manifest
    shutil.rmtree(tmp_path / "corpus")
    write_lines(tmp_path / "corpus" / "renamed" / "z.jsonl.gz", reversed(texts[:150]))
    write_lines(tmp_path / "corpus" / "b.json", texts[150:])
    write_lines(tmp_path / "corpus" / "added.jsonl", [text_of(21, seed=-n % 999) for n in range(50)])
    after = build(config(out=str(tmp_path / "after"), validation=0.3)).manifest
    tokenizer = load_tokenizer(tmp_path / "after" / "tokenizer")

    def splits(out: str, manifest: Manifest) -> dict[str, object]:
        pieces = documents_in(tmp_path / out, manifest).values()
        return {tokenizer.decode(of[0]["tokens"]): of[0]["split"] for of in pieces}

    old, new = splits("before", before), splits("after", after)
    assert len(old) == 300
    assert len(new) == 350
    assert {text: new[text] for text in old} == old


# Streaming leaves its shard files to the garbage collector.
@pytest.mark.slow
@pytest.mark.alone  # Streaming takes names of shared memory without a lock
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_streaming_reads_the_data_set(config, write_lines, tmp_path):
    from streaming import StreamingDataset

    write_lines(tmp_path / "corpus" / "a.jsonl", [text_of(n * 31 % 700, seed=n) for n in range(50)])
    manifest = build(config()).manifest
    for stream in manifest.streams:
        folder = tmp_path / "out" / stream.path
        dataset = StreamingDataset(
            remote=str(folder),
            local=str(tmp_path / "cache" / stream.path),
            shuffle=False,
            batch_size=1,
            validate_hash="sha256",
        )
        ours = [pack for shard in stream.shards for pack in read_shard(folder / shard.basename, shard)]
        for theirs, pack in zip(dataset, ours, strict=True):
            for name, column in pack.items():
                np.testing.assert_array_equal(theirs[name], column)


def test_manifest_counts_are_those_of_the_shards(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", [text_of(n * 41 % 5000, seed=n) for n in range(80)])
    build(config(validation=0.2))
    verify(tmp_path / "out")


# --- long documents ---


def test_truncate_drops_the_remainder_and_counts_it(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["0123456", "78"])
    manifest = build(config(edges=[4], long_documents="truncate")).manifest
    counts = manifest.counts["corpus"]
    assert (counts.targets_read, counts.targets["train"], counts.targets_cut) == (8 + 3, 4 + 3, 4)
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    pieces = [of[0]["tokens"] for of in documents_in(tmp_path / "out", manifest).values()]
    long = max(pieces, key=len)
    assert tokenizer.decode(long) == "0123"
    assert long[-1] != tokenizer.eos_id  # no false end


def test_drop_rejects_long_documents_with_a_reason(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["0123456", "78"])
    manifest = build(config(edges=[4], long_documents="drop")).manifest
    assert manifest.counts["corpus"].rejected == {"longer than 4": 1}
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {"source": "corpus", "file": "a.jsonl", "row": 0, "reason": "longer than 4"}


# --- duplicates ---


def test_the_first_of_equal_documents_is_kept(config, write_lines, tmp_path):
    write_lines(tmp_path / "b" / "1.jsonl", ["same", "other", "same"])
    write_lines(tmp_path / "a" / "2.jsonl", ["x", "same"])
    sources = {name: {"paths": str(tmp_path / name)} for name in ("b", "a")}
    manifest = build(config(sources=sources)).manifest
    assert {name: counts.duplicates for name, counts in manifest.counts.items()} == {"a": 0, "b": 2}
    assert manifest.counts["b"].documents == {"train": 1, "validation": 0}
    tokens_of_same = len(load_tokenizer(tmp_path / "out" / "tokenizer").encode("same")) + 1
    assert manifest.counts["b"].targets_duplicate == 2 * tokens_of_same


def test_all_of_a_stream_may_be_duplicates(config, write_lines, tmp_path):
    long = text_of(400, seed=0)
    write_lines(tmp_path / "a" / "1.jsonl", [long])
    write_lines(tmp_path / "b" / "1.jsonl", [long, "short"])
    sources = {name: {"paths": str(tmp_path / name)} for name in ("a", "b")}
    manifest = build(config(sources=sources)).manifest
    assert [stream.path for stream in manifest.streams] == ["train/b/1-256", "train/a/257-512"]


def test_duplicates_are_kept_on_request(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "1.jsonl", ["same", "same"])
    manifest = build(config(deduplicate="none")).manifest
    assert manifest.counts["corpus"].documents["train"] == 2


# --- what is broken ---


def broken_lines(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n{"text": null}\n')


def test_broken_documents_are_counted_and_listed_with_file_and_row(config, tmp_path):
    broken_lines(tmp_path)
    counts = build(config()).manifest.counts["corpus"]
    assert (counts.documents_read, counts.documents["train"]) == (3, 1)
    assert counts.rejected == {"'text' is null": 1, "invalid UTF-8": 1}
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["row"], entry["reason"]) for entry in listed] == [
        ("a.jsonl", 1, "invalid UTF-8"),
        ("a.jsonl", 2, "'text' is null"),
    ]


def test_on_error_stop_stops_at_the_first(config, tmp_path):
    broken_lines(tmp_path)
    with pytest.raises(InputError, match=r"a\.jsonl: row 1: invalid UTF-8; fix it, or set on_error=skip"):
        build(config(on_error="stop"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_on_error_stop_does_not_stop_at_documents_rejected_by_the_configuration(
    config, write_lines, tmp_path, monkeypatch
):
    hooks = (
        "def keep(record): return record['text'] != 'b'\ndef text(record): return record['text'].strip('c') or None\n"
    )
    (tmp_path / "hooks_of_the_pipeline.py").write_text(hooks)
    monkeypatch.syspath_prepend(tmp_path)
    write_lines(tmp_path / "corpus" / "a.jsonl", ["a", "b", "c", "0123456"])
    chosen = {"filter": "hooks_of_the_pipeline:keep", "transform": "hooks_of_the_pipeline:text"}
    sources = {"corpus": {"paths": str(tmp_path / "corpus"), **chosen}}
    counts = build(config(sources=sources, edges=[4], long_documents="drop", on_error="stop")).manifest.counts["corpus"]
    assert counts.documents["train"] == 1
    assert counts.rejected == {"longer than 4": 1, "rejected by the filter": 1, "rejected by the transform": 1}


def test_a_source_in_which_no_document_has_the_key_names_the_remedy(config, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(b'{"body": "x"}\n{"body": "y"}\n{"text": 5}\n')
    message = (
        r"sources\.corpus: no document in .*corpus; rejected: 1 \('text' is not a string\), 2 \(no 'text'\); "
        r"name the right key with `sources\.corpus\.text` or remove the source"
    )
    for run in (build, count):
        with pytest.raises(UserError, match=message):
            run(config())


def test_an_empty_source_stops(config, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(
        UserError, match=r"sources\.corpus: no document in .*corpus; fix the files or remove the source"
    ):
        build(config())


def test_a_source_without_usable_documents_is_refused_with_the_reasons(config, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(b'{"text": 5}\n')
    with pytest.raises(UserError, match=r"no document in .*; rejected: 1 \('text' is not a string\)"):
        build(config())


def test_a_broken_file_stops_and_nothing_looks_finished(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["fine"])
    (tmp_path / "corpus" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-20])
    with pytest.raises(InputError, match=r"b\.jsonl\.gz: broken gzip"):
        build(config())
    with pytest.raises(DataError, match="no finished data set here"):
        verify(tmp_path / "out")


# --- again ---


def test_a_finished_data_set_is_left_alone(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["one"])
    first = build(config())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = build(config(workers=2, on_error="stop"))
    assert (first.was_finished, again.was_finished) == (False, True)
    assert again.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_another_configuration_over_a_finished_data_set_is_refused_with_the_changes(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["one"])
    build(config())
    with pytest.raises(WorkError) as caught:
        build(config(seed=18, edges=[256, 512]))
    message = str(caught.value)
    assert "holds a finished data set" in message
    assert "config.seed: was 17, is 18" in message
    assert "config.edges: was [256, 512, 768" in message
    assert "choose another `out=`" in message


def test_changed_input_under_a_finished_data_set_is_refused_with_the_changes(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["one"])
    write_lines(tmp_path / "corpus" / "b.jsonl", ["two"])
    build(config())
    write_lines(tmp_path / "corpus" / "a.jsonl", ["one and a half"])
    write_lines(tmp_path / "corpus" / "c.jsonl", ["three"])
    (tmp_path / "corpus" / "b.jsonl").unlink()
    with pytest.raises(WorkError) as caught:
        build(config())
    message = str(caught.value)
    assert "files/corpus/a.jsonl: 16 bytes, changed at" in message
    assert "files/corpus/b.jsonl: gone" in message
    assert "files/corpus/c.jsonl: new" in message


def test_a_data_set_copied_without_its_work_folder_is_finished(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["one"])
    build(config())
    shutil.rmtree(tmp_path / "out" / ".prep")
    assert build(config()).was_finished
    with pytest.raises(WorkError, match=r"config\.seed: was 17, is 18"):
        build(config(seed=18))


def test_a_folder_with_unexpected_files_is_refused(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["one"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(WorkError, match=r"holds other files \(thesis\.tex\); choose an empty `out=`"):
        build(config())


def test_a_data_set_inside_its_own_input_is_refused(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["one"])
    with pytest.raises(
        WorkError, match=r"out: is inside \S+/corpus, which sources\.corpus reads; choose another `out=`"
    ):
        build(config(out=str(tmp_path / "corpus" / "out")))


def test_a_data_set_inside_another_is_refused(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["one"])
    (tmp_path / "set" / "tokenizer").mkdir(parents=True)
    (tmp_path / "set" / "manifest.json").touch()
    with pytest.raises(UserError, match=r"this data set would be in .*/set, which is a data set; choose another `out="):
        build(config(out=str(tmp_path / "set" / "out")))
    assert not (tmp_path / "set" / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_refused(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["one"])
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(UserError, match=rf"{place}: this folder .* cannot be made.*choose another `out=`"):
            build(config(out=str(place)))


def test_home_can_be_written_as_a_tilde(config, write_lines, tmp_path, monkeypatch):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["one"])
    monkeypatch.setenv("HOME", str(tmp_path))
    build(config(out="~/here"))
    assert (tmp_path / "here" / "manifest.json").exists()


# --- ids ---


class Altered:
    """A fast library that differs from the reference in what `alter` does to (texts, ids, offsets)."""

    def __init__(self, fast, alter):
        self.fast, self.alter = fast, alter

    def encode_batch_flat(self, texts, *options):
        ids, offsets = (np.frombuffer(buffer, dtype).copy() for buffer, dtype in zip(
            self.fast.encode_batch_flat(texts, *options), (np.uint32, np.int64), strict=True
        ))  # fmt: skip
        self.alter(texts, ids, offsets)
        return ids, offsets


def alter_fast(monkeypatch, alter):
    right = HuggingFaceTokenizer.__dict__["_fast"].func
    monkeypatch.setattr(HuggingFaceTokenizer, "_fast", property(lambda self: Altered(right(self), alter)))


def raise_the_last_id(texts, ids, offsets):
    ids[offsets[-2] + 1 :] += 1


def test_a_difference_from_the_reference_encodes_everything_again_with_it(
    config, write_lines, tmp_path, monkeypatch, caplog
):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["fine", "0123456789"])
    build(config(out=str(tmp_path / "right")))
    with monkeypatch.context() as patch:
        alter_fast(patch, raise_the_last_id)
        build(config())
    assert re.search(
        r"a\.jsonl: row 1: id 1 is \[\d+\], the reference gives \[\d+\] \(near '01234' in a text of 10 characters\); "
        "all texts are encoded again with the reference",
        caplog.text,
    )
    assert content(tmp_path / "out") == content(tmp_path / "right")


def test_units_without_a_difference_in_their_sample_are_also_encoded_again(config, write_lines, tmp_path, monkeypatch):
    for name in "ab":
        write_lines(tmp_path / "corpus" / f"{name}.jsonl", [f"{name} {number}" for number in range(200)])

    def alter(texts, ids, offsets):
        if len(texts) > 1:
            ids[offsets[-2]] += 1  # of the last document, for which no sample has room
        if texts[0].startswith("b"):
            ids[0] += 1

    values = {"unit_bytes": 1024, "workers": 1}
    build(config(out=str(tmp_path / "right"), **values))
    alter_fast(monkeypatch, alter)
    build(config(audit_bytes=16, **values))
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (tmp_path / "right" / "manifest.json").read_bytes()
    assert not (tmp_path / "out" / ".prep" / "by-reference").exists()


def test_a_kill_does_not_hide_a_difference_from_the_reference(config, write_lines, tmp_path, monkeypatch):
    """The build is killed when a unit is finished and its sample is not compared yet."""
    write_lines(tmp_path / "corpus" / "a.jsonl", ["fine", "0123456789"])
    build(config(out=str(tmp_path / "right")))
    alter_fast(monkeypatch, raise_the_last_id)
    with monkeypatch.context() as patch:
        patch.setattr(Audit, "check", lambda self, sample: None)
        patch.setattr(Path, "mkdir", unaudited(Path.mkdir))
        with pytest.raises(KeyboardInterrupt):
            build(config(), observer=Killed())
    assert list((tmp_path / "out" / ".prep" / "done" / "units").iterdir())
    build(config())
    assert content(tmp_path / "out") == content(tmp_path / "right")


def test_after_a_kill_the_reference_is_still_used(config, write_lines, tmp_path, monkeypatch):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["fine", "0123456789"])
    build(config(out=str(tmp_path / "right")))
    alter_fast(monkeypatch, raise_the_last_id)
    with pytest.raises(KeyboardInterrupt):
        build(config(), observer=Killed())
    assert (tmp_path / "out" / ".prep" / "by-reference").exists()
    build(config())
    assert content(tmp_path / "out") == content(tmp_path / "right")


class Killed(Observer):
    """Interrupts a build when all units are tokenized."""

    def step(self, name, *, totals, in_bytes=False):
        if name == "finding duplicates":
            raise KeyboardInterrupt


def unaudited(mkdir):
    def without(self, *arguments, **options):
        if self.parent.name != "audited":
            mkdir(self, *arguments, **options)

    return without


def test_the_audit_compares_the_beginning_of_long_documents(config, write_lines, tmp_path, monkeypatch, caplog):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["0123456789" * 100])

    def alter(texts, ids, offsets):
        ids[0] += 1

    alter_fast(monkeypatch, alter)
    build(config(audit_bytes=64))
    assert re.search(r"a\.jsonl: beginning of row 0: id 0 is", caplog.text)


def test_a_dry_run_also_uses_the_reference(config, write_lines, tmp_path, monkeypatch, caplog):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["<|endoftext|>", "0123456789"])

    def alter(texts, ids, offsets):
        ids[:] = 0  # eos: each document would be rejected

    alter_fast(monkeypatch, alter)
    (record,) = count(config()).records
    assert (record.documents, record.rejected) == (2, {})
    assert "all texts are encoded again with the reference" in caplog.text


def sentencepiece_without(character: str, folder: Path) -> Path:
    """Return a BPE with byte fallback, like Llama 2's; `character` has no token and is encoded as its byte."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(code) for code in range(0x21, 0x7F) if chr(code) != character]
    made = Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_texts_with_a_character_that_has_no_token_are_encoded_as_the_reference_does(
    config, write_lines, tmp_path, caplog, workers
):
    """fastokens 0.3.5 reads "<s>" in a text as that token, Hugging Face's library as the byte 0x3C, then "s>"."""
    folder = sentencepiece_without("<", tmp_path / "tokenizer")
    texts = ["The quick brown fox", "Price: <s>10</s> 8 dollars", "<0x41> <unk>"]
    write_lines(tmp_path / "corpus" / "a.jsonl", texts)
    built = build(config(tokenizer=str(folder), workers=workers)).manifest
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True
    expected = [[1, *reference.encode(text, add_special_tokens=False).ids, 2] for text in texts]
    pieces = documents_in(tmp_path / "out", built).values()
    assert sorted(of[0]["tokens"] for of in pieces) == sorted(expected)
    assert expected[1][9:11] == [1 + 2 + 0x3C, 259 + 1 + ord("s") - 0x22]  # "<" as its byte, then "s"


def test_a_tokenizer_that_loses_text_is_warned_of_with_an_example(config, write_lines, tmp_path, caplog):
    made = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2, " ": 3}, []))
    made.decoder = decoders.Fuse()
    made.save(str(tmp_path / "tokenizer.json"))
    write_lines(tmp_path / "corpus" / "a.jsonl", ["a b", "a 中b"])
    build(config(tokenizer=str(tmp_path / "tokenizer.json"), eos_token="</s>"))
    assert re.search(r"does not give the same text.*a\.jsonl: row 1: 'a 中b' becomes 'a b'", caplog.text)


def test_a_tokenizer_that_keeps_all_text_is_not_warned_of(config, write_lines, tmp_path, caplog):
    write_lines(tmp_path / "corpus" / "a.jsonl", HARD)
    build(config())
    assert "does not give the same text" not in caplog.text


def byte_level_without_capitals(file: Path) -> Path:
    tokens = ["</s>", *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set("ABCDEF"))]
    made = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(file))
    return file


def test_documents_with_a_byte_that_has_no_token_are_rejected(config, write_lines, tmp_path, caplog):
    file = byte_level_without_capitals(tmp_path / "tokenizer.json")
    write_lines(tmp_path / "corpus" / "a.jsonl", ["the fox", "the Fox", "ABBA", "中文"])
    built = build(config(tokenizer=str(file), eos_token="</s>")).manifest
    assert built.counts["corpus"].rejected == {"byte 0x41 has no token": 1, "byte 0x46 has no token": 1}
    assert built.counts["corpus"].documents["train"] == 2
    assert "no token for 6 bytes (0x41, 0x42, 0x43, 0x44…)" in caplog.text
    assert "streaming-rwkv train-tokenizer" in caplog.text


def test_a_byte_that_has_no_token_stops_a_strict_build(config, write_lines, tmp_path):
    file = byte_level_without_capitals(tmp_path / "tokenizer.json")
    write_lines(tmp_path / "corpus" / "a.jsonl", ["the fox", "the Fox"])
    with pytest.raises(InputError, match=r"a\.jsonl: row 1: byte 0x46 has no token"):
        build(config(tokenizer=str(file), eos_token="</s>", on_error="stop"))


def test_bpe_dropout_is_turned_off(config, write_lines, tokenizer_folder, tmp_path):
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    definition["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    write_lines(tmp_path / "corpus" / "a.jsonl", ["the quick brown fox jumps over the lazy dog"])
    plain = build(config(out=str(tmp_path / "plain"))).manifest
    dropping = build(config(tokenizer=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>")).manifest
    assert [stream.shards for stream in dropping.streams] == [stream.shards for stream in plain.streams]


def test_a_tokenizer_that_only_hugging_face_can_encode_builds_and_false_ends_are_rejected(
    config, write_lines, tmp_path
):
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    write_lines(tmp_path / "corpus" / "a.jsonl", ["a b a", "b", "a [SEP] b"])
    manifest = build(config(tokenizer=str(tmp_path / "tokenizer.json"), eos_token="[SEP]")).manifest
    stored = sorted(of[0]["tokens"] for of in documents_in(tmp_path / "out", manifest).values())
    assert stored == [[1, 2, 3, 2, 1], [1, 3, 1]]
    # Here [SEP] is a word of the model itself: no way of encoding keeps it out of the third document.
    assert manifest.counts["corpus"].rejected == {"text encodes to bos or eos": 1}
    assert manifest.counts["corpus"].targets_read == 4 + 2


# --- verify ---


@pytest.fixture
def finished(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", [text_of(n * 31 % 700, seed=n) for n in range(50)])
    return tmp_path / "out", build(config()).manifest


def test_verify_finds_a_flipped_byte(finished):
    out, manifest = finished
    file = out / manifest.streams[0].path / manifest.streams[0].shards[0].basename
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DataError, match=f"{file.name}: sha256 .*, the manifest says"):
        verify(out)


def test_verify_finds_a_missing_shard(finished):
    out, manifest = finished
    (out / manifest.streams[0].path / manifest.streams[0].shards[0].basename).unlink()
    with pytest.raises(DataError, match="missing; the manifest names it"):
        verify(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["streams"][0].update(targets=1), "targets, but its counts are 50 and"),
        (lambda values: values["streams"][0].update(upper=3), "train/corpus/1-3 is no bucket of the edges"),
        (lambda values: values["counts"]["corpus"].update(duplicates=7), "counts of source corpus do not balance"),
        (lambda values: values.update(pack_tokens=9), "packs of at most 9 inputs"),
        (lambda values: values["tokenizer"].update(sha256="0" * 64), "that made the tokens is '0000"),
        (lambda values: values["streams"].pop(), "the streams of train/corpus hold"),
    ],
)
def test_verify_finds_a_manifest_that_does_not_match(finished, change, message):
    out, _ = finished
    values = json.loads((out / "manifest.json").read_bytes())
    change(values)
    if "is no bucket" in message:
        (out / "train" / "corpus" / "1-256").rename(out / "train" / "corpus" / "1-3")
    (out / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=message):
        verify(out)


@pytest.mark.parametrize("command", ["verify", "inspect", "report"])
def test_no_command_reads_tokens_by_another_tokenizer(finished, command, capsys):
    out, _ = finished
    shutil.rmtree(out / "tokenizer")
    load_tokenizer("rwkv-world").save(out / "tokenizer")
    assert main([command, str(out)]) == 1
    assert re.search(
        r"out/tokenizer: \w+ is .*, that of the tokenizer that made the tokens is ", capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["index.json", "shard.00000.mds.zstd"])
def test_verify_does_not_read_a_file_that_is_larger_than_any_shard(finished, name):
    out, manifest = finished
    os.truncate(out / manifest.streams[0].path / name, 1 << 40)  # a hole, which takes no room
    with pytest.raises(DataError, match=r"found 1,099,511,627,776 bytes, expected less than 4,294,967,296"):
        verify(out)


@pytest.mark.parametrize("kind", ["named pipe", "device"])
def test_verify_does_not_wait_for_a_pipe_or_read_a_device(finished, kind):
    out, manifest = finished
    file = out / manifest.streams[0].path / "index.json"
    file.unlink()
    if kind == "device":
        file.symlink_to("/dev/zero")
    else:
        os.mkfifo(file)
    with pytest.raises(DataError, match=r"index\.json: not a regular file; restore it, or build again"):
        verify(out)


# --- dry run ---


def test_a_dry_run_counts_and_writes_nothing(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["0", "0", "12345"])
    records = count(config(edges=[3, 8])).records
    assert not (tmp_path / "out").exists()
    assert [(stream.documents, stream.pieces, stream.targets) for stream in records[0].streams] == [
        (2, 2, 4),
        (1, 1, 6),
        (0, 0, 0),
        (0, 0, 0),
    ]
    assert (records[0].documents_read, records[0].targets_read) == (3, 10)


@pytest.mark.parametrize("name", [".prep/done", "train", "tokenizer"])
def test_a_build_with_links_is_not_resumed(config, write_lines, tmp_path, name):
    """It may be a stranger's: it would write and delete where they point to."""
    write_lines(tmp_path / "corpus" / "a.jsonl", ["x"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    recipe = config()
    (recipe.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (recipe.folder / name).symlink_to(elsewhere)
    with pytest.raises(UserError, match=rf"{name}: found a symbolic link, .*; remove it, or choose another `out=`"):
        build(recipe)
    assert not list(elsewhere.iterdir())
