"""A run that was stopped, moved to other machines and stopped again sees in every step what it would have seen.

Most of it is below Composer and without data: the packs of each step are what `share_of_batches` gives the workers of
each rank. A few read real shards through forked loaders.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter

import numpy as np
import pytest

from streaming_rwkv.data.loader import LoaderOptions, PackDataset, data_spec, share_of_batches, training_batches
from streaming_rwkv.data.mixture import StageConfig, make_plan
from streaming_rwkv.data.shard_set import open_shard_set
from tests.data.streams import stream

BATCH_PACKS = 16
MIXTURES = {
    "natural, two passes": [{"passes": 2}],
    "sources": [{"tokens": 90_000, "sources": {"web": 0.7, "code": 0.3}}],
    "sources and buckets": [
        {"tokens": 90_000, "sources": {"web": 0.8, "code": 0.2}, "buckets": {"1-256": 0.7, "257-512": 0.3}}
    ],
    "temperature": [{"tokens": 90_000, "temperature": 3.0}],
    "three stages": [
        {"tokens": 40_000, "max_length": 256},
        {"tokens": 33_333, "sources": {"web": 0.5, "code": 0.5}},
        {"passes": 0.4, "min_length": 257},
    ],
    "short and long in turn": [{"tokens": 20_000, "max_length": 256}, {"tokens": 20_000, "min_length": 257}] * 3,
    "passes that end within batches": [{"passes": 1}, {"passes": 0.51}, {"passes": 1.3}],
}


@pytest.fixture(params=MIXTURES)
def plan(request):
    streams = [
        stream("web", 256, 101),
        stream("web", 512, 53, targets_per_pack=80),
        stream("code", 256, 977),
    ]
    stages = [StageConfig(**stage) for stage in MIXTURES[request.param]]
    return make_plan(stages, streams, batch_packs=BATCH_PACKS, seed=5, block_shards=2)


def seen(plan, start, stop, *, ranks, workers):
    """(stop - start, BATCH_PACKS) ids that a run from `start` to `stop` trains on, rank beside rank."""
    batches, num_batches = training_batches(plan)
    columns = []
    for rank in range(ranks):
        shares = [
            share_of_batches(
                batches,
                start=start,
                stop=num_batches,
                batch_packs=BATCH_PACKS,
                rank=rank,
                ranks=ranks,
                worker=worker,
                workers=workers,
            )
            for worker in range(workers)
        ]
        in_turn = itertools.islice(itertools.cycle(shares), stop - start)  # as DataLoader asks its workers
        columns.append(np.array([list(itertools.islice(share, BATCH_PACKS // ranks)) for share in in_turn]))
    return np.concatenate(columns, axis=1)


def boundaries(plan):
    """The last step of each stage and of each pass, and the steps beside them."""
    packs = sum(stream.packs for stream in plan.streams)
    ends = [stage.first_step + stage.steps for stage in plan.stages]
    ends += [n * packs // BATCH_PACKS for n in range(1, plan.steps * BATCH_PACKS // packs + 1)]
    return sorted({end + beside for end in ends for beside in (-1, 0, 1) if 0 < end + beside < plan.steps})


@pytest.mark.parametrize("chunk_slots", [1 << 15, 7 * BATCH_PACKS])
@pytest.mark.parametrize("case", range(10))
def test_a_run_stopped_anywhere_and_resumed_in_any_world_reads_the_same_packs(plan, chunk_slots, case, monkeypatch):
    monkeypatch.setattr("streaming_rwkv.data.loader.CHUNK_SLOTS", chunk_slots)
    rng = random.Random(case)
    ends = boundaries(plan)
    stops = sorted(
        {*(rng.randrange(plan.steps) for _ in range(rng.randint(1, 4))), *rng.sample(ends, min(2, len(ends)))}
    )
    parts = [
        seen(plan, start, stop, ranks=rng.choice([1, 2, 4]), workers=rng.choice([1, 2, 3]))
        for start, stop in itertools.pairwise([0, *stops, plan.steps])
        if start < stop
    ]
    assert np.concatenate(parts).tolist() == plan.packs(0, plan.steps).tolist()


def test_every_boundary_can_be_resumed_from(plan):
    whole = plan.packs(0, plan.steps)
    for step in boundaries(plan):
        assert seen(plan, step, plan.steps, ranks=2, workers=2).tolist() == whole[step:].tolist()


def test_each_pack_of_a_stream_is_seen_once_before_any_is_seen_twice(plan):
    ids = seen(plan, 0, plan.steps, ranks=4, workers=2).ravel()
    for first, record in zip(plan.first_pack, plan.streams, strict=True):
        walk = ids[(ids >= first) & (ids < first + record.packs)]
        # Rank after rank within a step is the plan's order, so a pass of the stream is a stretch of the walk.
        for start in range(0, len(walk), record.packs):
            part = walk[start : start + record.packs]
            assert len(np.unique(part)) == len(part)


def test_consumed_shares_are_the_requested_shares(plan):
    """After every step of a stage each stream has given its rate's part of all packs, within two."""
    whole = plan.packs(0, plan.steps)
    targets_per_pack = np.array([stream.targets_per_pack for stream in plan.streams])
    for stage in plan.stages:
        rows = whole[stage.first_step : stage.first_step + stage.steps]
        stream = np.searchsorted(plan.first_pack, rows, side="right") - 1
        given = np.array([(stream == s).sum(1).cumsum() for s in range(len(plan.streams))])
        slots = BATCH_PACKS * (1 + np.arange(len(rows)))
        assert np.abs(given - stage.rates[:, None] * slots).max() < 2
        # In tokens: the shares the user wrote, each within two packs of the tokens there were.
        tokens = given[:, -1] * targets_per_pack
        assert np.abs(tokens - stage.requested * tokens.sum()).max() < 2 * targets_per_pack.max()


def open_run(data, cache, *, rank=0, ranks=1):
    """Open the data as a run of `ranks` processes does; returns the function that closes it too."""
    shard_set = open_shard_set(data, cache=cache, splits=("train",), timeout_seconds=60, fetch=True)
    records = shard_set.manifest.select("train")
    stages = [
        StageConfig(tokens=2500, sources={"web": 0.6, "code": 0.4}),
        StageConfig(passes=1.2),
        StageConfig(tokens=900, min_length=17),
    ]
    plan = make_plan(stages, records, batch_packs=4, seed=3, block_shards=2)
    dataset = PackDataset(
        shard_set,
        records,
        batches=plan.packs,
        num_batches=plan.steps,
        batch_packs=4,
        options=LoaderOptions(fetch_ahead=8, download_attempts=1, timeout_seconds=60),
    )
    dataset.rank, dataset.num_ranks = rank, ranks

    def close():
        shard_set.lock.release()
        dataset.close()

    return dataset, plan, close


def batches_of(data, cache, *, start, stop, ranks, workers):
    """Tokens of each pack of steps start … stop - 1 as the ranks read them; workers are stopped in the middle."""
    rows = [[] for _ in range(stop - start)]
    for rank in range(ranks):
        dataset, _, close = open_run(data, cache, rank=rank, ranks=ranks)
        dataset.start_at(start)
        loader = data_spec(dataset, workers=workers, timeout_seconds=60).dataloader
        for row, batch in zip(rows, itertools.islice(loader, stop - start), strict=True):
            bounds = batch["pack_starts"].tolist()
            row += [batch["tokens"][0, low:high].tolist() for low, high in itertools.pairwise(bounds)]
        close()
    return rows


def test_forked_loaders_of_a_stopped_and_moved_run_read_the_same_packs(tmp_path, write_data_set):
    data = write_data_set(tmp_path / "data", {("web", 1, 16): 40, ("web", 17, 32): 30, ("code", 1, 16): 23})
    _, plan, close = open_run(data, tmp_path / "cache")
    close()
    whole = batches_of(data, tmp_path / "cache", start=0, stop=plan.steps, ranks=1, workers=0)
    assert len({str(row) for row in whole}) == plan.steps
    stage_end, last = plan.stages[1].first_step, plan.steps - 1
    legs = [(0, 5, 2, 1), (5, stage_end, 1, 2), (stage_end, 30, 4, 2), (30, last, 2, 0), (last, plan.steps, 1, 1)]
    for start, stop, ranks, workers in legs:
        found = batches_of(data, tmp_path / "cache", start=start, stop=stop, ranks=ranks, workers=workers)
        assert found == whole[start:stop], (start, stop, ranks, workers)


WITH_FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
import itertools, os
from streaming_rwkv.data.loader import LoaderOptions, PackDataset, data_spec, evaluation_batches
from streaming_rwkv.data.mixture import StageConfig, make_plan
from streaming_rwkv.data.shard_set import open_shard_set

data, cache = sys.argv[1:]
shard_set = open_shard_set(data, cache=cache, splits=("train", "validation"), timeout_seconds=60, fetch=True)
common = dict(batch_packs=8, options=LoaderOptions(download_attempts=1, timeout_seconds=60))
train, validation = (shard_set.manifest.select(split) for split in ("train", "validation"))
assert len(train) == len(validation) == 48
plan = make_plan([StageConfig(passes=2)], train, batch_packs=8, seed=1, block_shards=4)
train_set = PackDataset(shard_set, train, batches=plan.packs, num_batches=plan.steps, **common)
batches, count = evaluation_batches([record.packs for record in validation], batch_packs=8)
validation_set = PackDataset(shard_set, validation, batches=batches, num_batches=count, **common)
steps = 0
for batch in data_spec(train_set, workers=2, timeout_seconds=60).dataloader:
    steps += 1
    if steps % 20 == 0:  # an evaluation in the middle of training
        assert len(list(data_spec(validation_set, workers=0, timeout_seconds=60).dataloader)) == count
assert steps == plan.steps == 24, steps
print("open files:", len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.slow
def test_six_sources_of_eight_buckets_need_few_files(tmp_path, write_data_set, programs):
    streams = {(f"s{s}", 8 * b + 1, 8 * b + 8): 2 for s in range(6) for b in range(8)}
    data = write_data_set(tmp_path / "data", streams, validation=dict.fromkeys(streams, 1))
    (tmp_path / "with_few_files.py").write_text(WITH_FEW_FILES)
    done = programs.run([sys.executable, tmp_path / "with_few_files.py", data, tmp_path / "cache"], timeout=240)
    assert done.returncode == 0, done.stderr
    files = dict([line.split(": ") for line in done.stdout.splitlines() if line.startswith("open files")])
    assert int(files["open files"]) < 300  # of 1024, with both data sets open


def test_the_order_does_not_depend_on_what_was_read_before(plan):
    forwards = [plan.packs(step, step + 1).tolist() for step in range(plan.steps)]
    backwards = [plan.packs(step, step + 1).tolist() for step in reversed(range(plan.steps))]
    assert forwards == backwards[::-1]
    assert Counter(np.ravel(forwards).tolist()) == Counter(plan.packs(0, plan.steps).ravel().tolist())
