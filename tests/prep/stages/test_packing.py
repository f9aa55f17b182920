"""Windows: bounded stretches of a stream, each packed by itself."""

from __future__ import annotations

from prep.build import build
from prep.dataset.shard_reader import read_shard
from prep.dataset.verification import verify
from prep.execution.intermediate import Block
from prep.stages.packing import _by_tokens


def block(tokens: int) -> Block:
    return Block(stream=0, offset=0, pieces=1, tokens=tokens)


def test_blocks_are_grouped_up_to_a_number_of_tokens():
    blocks = [(unit, block(tokens)) for unit, tokens in enumerate([3, 3, 3, 9, 1, 1])]
    groups = [[unit for unit, _ in group] for group in _by_tokens(blocks, 6)]
    assert groups == [[0, 1], [2], [3], [4, 5]]


def test_a_stream_of_many_windows_holds_every_document_once(config, write_lines, tmp_path):
    texts = {f"{number:04}" * 25 for number in range(300)}
    for part in range(10):
        write_lines(tmp_path / "corpus" / f"{part}.jsonl", sorted(texts)[part::10])
    small = config(unit_bytes=1000, window_tokens=3000, pack_tokens=1024, edges=[1024], shard_bytes=1 << 14)
    manifest = build(small).manifest
    verify(tmp_path / "out")
    (stream,) = manifest.streams
    assert stream.documents == 300
    assert [shard.basename for shard in stream.shards] == [
        f"shard.{number:05}.mds.zstd" for number in range(len(stream.shards))
    ]
    assert len(stream.shards) > 5
    folder = tmp_path / "out" / stream.path
    packs = [pack for shard in stream.shards for pack in read_shard(folder / shard.basename, shard)]
    assert len({int(key) for pack in packs for key in pack["keys"]}) == 300


def test_windows_cost_one_pack_each_at_most(config, write_lines, tmp_path):
    for part in range(10):
        write_lines(tmp_path / "corpus" / f"{part}.jsonl", [f"{part}{row:03}" * (1 + row % 9) for row in range(30)])
    packs = {}
    for name, tokens in (("one", 1 << 24), ("many", 1500)):
        made = config(out=str(tmp_path / name), unit_bytes=500, window_tokens=tokens, pack_tokens=256, edges=[256])
        packs[name] = sum(stream.packs for stream in build(made).manifest.streams)
    assert packs["one"] <= packs["many"] <= packs["one"] + 10
