"""Steps have the mixture that the configuration asks for: shares, passes, stages, and any step by itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_rwkv.config import ConfigError, validate
from streaming_rwkv.data.mixture import (
    MOST_PLAN_PACKS,
    StageConfig,
    count_batch_packs,
    due_order,
    make_plan,
    token_shares,
)
from tests.data.streams import stream

THREE = [stream("web", 256, 101), stream("web", 512, 53, targets_per_pack=80), stream("code", 256, 977)]


def plan_of(stages, streams=THREE, *, batch_packs=16, seed=1):
    configs = [validate(StageConfig, stage, where="stage") for stage in stages]
    return make_plan(configs, streams, batch_packs=batch_packs, seed=seed, block_shards=2)


def stream_of(plan, ids):
    return np.searchsorted(plan.first_pack, ids, side="right") - 1


def test_packs_come_due_evenly():
    # Rates 1/2, 1/4, 1/4 with equal offsets: each run of four has two of the first stream.
    slots = due_order(np.array([0.5, 0.25, 0.25]), np.array([0.5, 0.5, 0.5]), start=0, stop=8)
    assert slots.stream.tolist() == [0, 1, 2, 0, 0, 1, 2, 0]
    assert slots.number.tolist() == [0, 0, 0, 1, 2, 1, 1, 3]


def test_without_shares_each_pack_is_seen_once_a_pass_and_the_rest_opens_the_next():
    plan = plan_of([{"passes": 3}])
    ids = plan.packs(0, plan.steps).ravel()
    packs = 101 + 53 + 977
    assert plan.steps == 3 * packs // 16  # 1131 is no multiple of 16: the tail of a pass begins the next one
    for pass_number in range(2):
        assert sorted(ids[pass_number * packs : (pass_number + 1) * packs]) == list(range(packs))


def test_packs_that_a_stage_leaves_over_open_the_next_over_the_same_streams():
    """A window's remainder is its own: in the next window's passes it would be seen twice, and here never."""
    streams = [stream("web", 256, 1000), stream("web", 512, 1000)]
    stages = [{"passes": 1, "max_length": 256}, {"passes": 1, "min_length": 257}] * 4
    plan = plan_of(stages, streams, batch_packs=300)
    assert [stage.steps for stage in plan.stages] == [3, 3, 3, 3, 4, 4, 3, 3]
    counts = np.bincount(plan.packs(0, plan.steps).ravel(), minlength=2000)
    assert counts.reshape(2, -1).sum(1).tolist() == [3900, 3900]  # of 4000, in whole batches
    assert set(counts.tolist()) == {3, 4}


@pytest.mark.parametrize(("first", "then"), [(16, 32), (16, 4), (12, 10), (10, 12)])
def test_with_another_batch_size_the_run_continues_where_it_was(first, then):
    stages = [{"tokens": 30_000, "max_length": 256}, {"passes": 1}]
    before, whole = plan_of(stages, batch_packs=first), plan_of(stages, batch_packs=then)
    step = 7
    after = whole.resumed_at(step=step, slots=before.slots_before(step))
    skipped = -(step * first) % then  # less than a batch, lest a pack come twice
    slots = np.concatenate([before.packs(0, step).ravel(), after.packs(step, after.steps).ravel()])
    expected = whole.packs(0, whole.steps).ravel()
    assert slots[: step * first].tolist() == expected[: step * first].tolist()
    assert slots[step * first :].tolist() == expected[step * first + skipped :].tolist()
    # Started again with the same size, and changed once more.
    again = whole.resumed_at(step=step + 2, slots=after.slots_before(step + 2))
    assert again.packs(step + 2, again.steps).tolist() == after.packs(step + 2, after.steps).tolist()
    assert again.stage_of(step) == after.stage_of(step)
    back = before.resumed_at(step=step + 2, slots=after.slots_before(step + 2))
    assert back.slots_before(step + 2) - after.slots_before(step + 2) in range(first)


def test_shares_count_tokens_and_not_packs():
    # web/512 has 80 targets in a pack and web/256 has 100: equal shares need 5 packs of it for every 4.
    plan = plan_of([{"tokens": 160_000, "streams": {"web/1-256": 1, "web/257-512": 1, "code/1-256": 0}}])
    counts = np.bincount(stream_of(plan, plan.packs(0, plan.steps).ravel()), minlength=3)
    assert counts[2] == 0
    assert counts[1] / counts[0] == pytest.approx(1.25, abs=0.005)


def test_every_batch_is_mixed_alike():
    plan = plan_of([{"tokens": 160_000, "sources": {"web": 0.25, "code": 0.75}}])
    for row in plan.packs(0, plan.steps):
        assert 3 <= (stream_of(plan, row) < 2).sum() <= 6  # a quarter of 16, and web's packs hold a little less


def test_sources_and_buckets_are_both_met():
    shares = token_shares(
        StageConfig(tokens=1, sources={"web": 0.6, "code": 0.4}, buckets={"1-256": 0.8, "257-512": 0.2}),
        THREE,
        where="x",
    )
    assert shares == pytest.approx([0.4, 0.2, 0.4])


def test_temperature_lifts_small_sources():
    natural = token_shares(StageConfig(tokens=1), THREE, where="x")
    flat = token_shares(StageConfig(tokens=1, temperature=2.0), THREE, where="x")
    assert natural[2] == pytest.approx(97_700 / (10_100 + 4_240 + 97_700))
    assert flat[2] == pytest.approx(97_700**0.5 / (97_700**0.5 + 14_340**0.5))


def test_a_window_of_lengths_takes_whole_buckets():
    assert (token_shares(StageConfig(tokens=1, min_length=257, max_length=512), THREE, where="x") > 0).tolist() == [
        False,
        True,
        False,
    ]
    with pytest.raises(
        ConfigError, match=r"data.stages.0: min_length 100, max_length 512 cut through the bucket 1-256"
    ):
        token_shares(StageConfig(tokens=1, min_length=100, max_length=512), THREE, where="data.stages.0")
    with pytest.raises(ConfigError, match="no bucket within"):
        token_shares(StageConfig(tokens=1, min_length=513), THREE, where="x")


def test_no_pack_is_seen_twice_before_every_pack_was_seen_across_stages():
    plan = plan_of(
        [
            {"tokens": 20_000, "sources": {"web": 0.9, "code": 0.1}},
            {"tokens": 30_000, "buckets": {"1-256": 0.5, "257-512": 0.5}},
            {"tokens": 9_000, "min_length": 257},
        ]
    )
    assert len(plan.stages) == 3
    ids = plan.packs(0, plan.steps).ravel()
    for s, record in enumerate(THREE):
        seen = ids[stream_of(plan, ids) == s]
        for start in range(0, len(seen), record.packs):
            part = seen[start : start + record.packs]
            assert len(set(part)) == len(part)
    assert np.bincount(stream_of(plan, ids), minlength=3).tolist() == plan.end.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(50, 120)), min_size=1, max_size=6),
    st.lists(st.floats(0.01, 1.0), min_size=6, max_size=6),
    st.integers(1, 40),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
def test_any_part_of_the_run_can_be_worked_out_alone(streams, shares, batch_packs, seed, random):
    records = [stream(f"s{i}", 256, packs, targets_per_pack=t) for i, (packs, t) in enumerate(streams)]
    sources = {f"s{i}": share for i, share in enumerate(shares[: len(records)])}
    plan = plan_of(
        [{"tokens": 70_000, "sources": sources}, {"passes": 0.7}], records, batch_packs=batch_packs, seed=seed
    )
    whole = plan.packs(0, plan.steps)
    assert whole.shape == (plan.steps, batch_packs)
    for _ in range(5):
        start, stop = sorted((random.randint(0, plan.steps), random.randint(0, plan.steps)))
        assert plan.packs(start, stop).tolist() == whole[start:stop].tolist()
    assert np.bincount(stream_of(plan, whole.ravel()), minlength=len(records)).tolist() == plan.end.tolist()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"tokens": 1, "sources": {"web": 1}}, "0.sources: no share for 'code'; name every one; 0 leaves it out"),
        ({"tokens": 1, "sources": {"wbe": 1, "web": 1, "code": 1}}, "stages.0.sources.wbe: not in this selection"),
        ({"tokens": 1, "buckets": {"1-256": 1}}, "stages.0.buckets: no share for '257-512'"),
        ({"tokens": 1, "sources": {"web": 1e308, "code": 1e308}}, "0.sources: the shares are too large to be added"),
        (
            {"tokens": 1, "sources": {"web": 0.1, "code": 0.9}, "buckets": {"1-256": 0.1, "257-512": 0.9}},
            "no mixture meets both",
        ),
    ],
)  # fmt: skip
def test_shares_that_cannot_be_met_are_refused(stage, message):
    with pytest.raises(ConfigError, match=message):
        plan_of([stage])


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({}, "give either `tokens` or `passes`"),
        ({"passes": 1, "sources": {"web": 1}}, "`passes` needs natural shares"),
        ({"tokens": 1, "temperature": 1e-300}, "temperature"),
        ({"tokens": 1, "streams": {"web/1-256": 1}, "temperature": 2}, "cannot be combined"),
        (
            {"tokens": 1, "sources": {"web": 1, "code": -1}},
            r"stage: `sources`: found code: -1; shares must not be negative, 0 leaves one out",
        ),
        ({"tokens": 1, "buckets": {"1-256": 0, "257-512": 0}}, "`buckets`: found 1-256: 0, 257-512: 0; at least one"),
        ({"tokens": 1, "min_length": 600, "max_length": 300}, "`min_length`: found 600, above `max_length` 300"),
    ],
)
def test_stages_that_contradict_themselves_are_refused(stage, message):
    with pytest.raises(ConfigError, match=message):
        validate(StageConfig, stage, where="stage")


def partial_plan(stages, *, share, streams=THREE):
    configs = [validate(StageConfig, stage, where="stage") for stage in stages]
    return make_plan(configs, streams, batch_packs=16, seed=1, block_shards=2, share=share)


def test_a_pass_over_a_part_sees_each_of_its_packs_once_and_no_other():
    plan = partial_plan([{"passes": 4}], share=0.25)
    packs = 25 + 13 + 244  # a quarter of 101, 53 and 977
    assert [order.packs for order in plan.orders] == [25, 13, 244]
    assert plan.steps == 4 * packs // 16
    ids = plan.packs(0, plan.steps).ravel()
    first = ids[:packs].tolist()
    assert len(set(first)) == packs
    assert set(ids.tolist()) == set(first)
    for pass_number in range(3):
        assert sorted(ids[pass_number * packs : (pass_number + 1) * packs]) == sorted(first)


def test_a_part_repeats_its_packs_as_the_whole_does_its_own():
    """A sixteenth of the tokens of a run with a sixteenth of the data: the same passes over each stream."""
    streams = [stream("web", 256, 1600), stream("code", 256, 16000)]
    shares = {"sources": {"web": 0.5, "code": 0.5}}
    whole = partial_plan([{"tokens": 1_600_000, **shares}], share=1.0, streams=streams)
    part = partial_plan([{"tokens": 100_000, **shares}], share=0.0625, streams=streams)
    repeats = [plan.end / [order.packs for order in plan.orders] for plan in (whole, part)]
    # Whole steps of 16 packs, and one pack more or less: within a few packs of a hundred.
    assert repeats[1] == pytest.approx(repeats[0], rel=0.05)
    counts = np.bincount(part.packs(0, part.steps).ravel(), minlength=17600)[:1600]
    assert (counts > 0).sum() == 100
    assert counts.max() - counts[counts > 0].min() <= 1


def test_the_whole_is_the_plan_without_a_part():
    stages = [{"tokens": 30_000, "sources": {"web": 0.3, "code": 0.7}}, {"passes": 1}]
    assert partial_plan(stages, share=1.0).packs(0, 50).tolist() == plan_of(stages).packs(0, 50).tolist()


def test_other_parts_of_the_seed_are_other_packs():
    configs = [validate(StageConfig, {"passes": 1}, where="stage")]
    plans = [make_plan(configs, THREE, batch_packs=16, seed=seed, block_shards=2, share=0.25) for seed in (1, 2)]
    one, two = (set(plan.packs(0, plan.steps).ravel().tolist()) for plan in plans)
    assert one != two


def test_a_run_is_refused_if_its_order_cannot_be_computed():
    packs = sum(record.packs for record in THREE)
    longest = MOST_PLAN_PACKS // packs
    plan = plan_of([{"passes": 1_000_000}] * (longest // 1_000_000), batch_packs=packs)
    assert plan.packs(plan.steps - 1, plan.steps).shape == (1, packs)
    assert plan.end.sum() == plan.steps * packs
    message = (
        r"^data\.stages\.0: by its end the run would read [\d,]+ packs; expected at most 1,099,511,627,776; shorten"
    )
    with pytest.raises(ConfigError, match=message):
        plan_of([{"tokens": 10**15}])


@pytest.mark.parametrize("size", [{"batch_packs": 1 << 21}, {"batch_tokens": 10**12}])
def test_a_step_has_a_largest_number_of_packs(size):
    given = {"batch_packs": None, "batch_tokens": None} | size
    name = next(iter(size))
    with pytest.raises(ConfigError, match=rf"^data\.{name}: found [\d,]+, which is [\d,]+ packs .* at most 1,048,576;"):
        count_batch_packs(**given, pack_tokens=8192, world_size=8, where="data.")
