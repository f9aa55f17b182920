"""Mixture and order of packs: token shares from the user, pack rates from the manifest, then pure arithmetic.

A user asks for shares of *tokens*, by source, by bucket, or by stream. Streams differ in tokens per pack, so shares
of tokens become rates of packs. Stream i with rate q_i has its j-th pack due at time (j + u_i) / q_i with a seeded
offset u_i; packs are trained on in order of their due times. So at any moment each stream is within a few packs of
its share, all batches have the same mixture, and the pack of slot n can be computed for any n directly.
With natural rates (packs of the stream / packs in all) each run through all slots sees each pack exactly once.

A stream's position only grows, across passes and stages: every pack of a stream is used once before any repeats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from streaming_rwkv.config import Config, ConfigError
from streaming_rwkv.data.order import Ints, Order, fraction, stream_order
from streaming_rwkv.quantities import PositiveCount
from streaming_rwkv.shards import StreamRecord, offsets_of

Floats = NDArray[np.float64]
MOST_BATCH_PACKS = 1 << 20
MOST_PLAN_PACKS = 1 << 40  # due times are compared as 64-bit floats
ORDER_VERSION = 2  # raised when the same configuration would give another order; checkpoints carry it


class MixtureConfig(Config):
    """Shares of tokens; a share that is not given is natural (in proportion to the number of tokens)."""

    sources: dict[str, float] | None = None
    """Token share of each source. Every source must be named; 0 leaves a source out."""
    buckets: dict[str, float] | None = None
    """Token share of each bucket ('1-256'). Every bucket within the lengths must be named; 0 leaves a bucket out."""
    streams: dict[str, float] | None = None
    """Token share of each 'source/bucket'; not together with `sources`, `buckets` or `temperature`."""
    temperature: float | None = Field(default=None, ge=0.05)
    """Shares of sources in proportion to tokens ** (1 / temperature): a value above 1 raises small sources."""
    min_length: int | None = None
    """Smallest document length, in tokens; must be the lower bound of a bucket."""
    max_length: int | None = None
    """Largest document length, in tokens; must be the upper bound of a bucket."""

    @model_validator(mode="after")
    def _one_way(self) -> MixtureConfig:
        if self.streams is not None and (self.sources or self.buckets or self.temperature):
            raise ValueError("`streams` gives every share; it cannot be combined with sources, buckets or temperature")
        if self.sources is not None and self.temperature is not None:
            raise ValueError("`sources` and `temperature` both give the shares of sources; keep one")
        for name in ("sources", "buckets", "streams"):
            shares: dict[str, float] | None = getattr(self, name)
            if shares is None:
                continue
            negative = [f"{key}: {share:g}" for key, share in shares.items() if share < 0]
            if negative:
                raise ValueError(
                    f"`{name}`: found {', '.join(negative)}; shares must not be negative, 0 leaves one out"
                )
            if sum(shares.values()) == 0:
                given = ", ".join(f"{key}: {share:g}" for key, share in shares.items()) or "none"
                raise ValueError(f"`{name}`: found {given}; at least one share must be above 0")
        if self.min_length is not None and self.max_length is not None and self.min_length > self.max_length:
            raise ValueError(
                f"`min_length`: found {self.min_length}, above `max_length` {self.max_length}; no document has "
                "such a length"
            )
        return self


class StageConfig(MixtureConfig):
    """Stage of a curriculum: a mixture, and a length in tokens or in passes over the data."""

    tokens: PositiveCount | None = None
    """Length of the stage in tokens ('1.5B' is 1,500,000,000); give either this or `passes`."""
    passes: float | None = Field(default=None, gt=0, le=1_000_000)
    """Length of the stage in passes over its buckets, with natural shares."""

    @model_validator(mode="after")
    def _one_length(self) -> StageConfig:
        if (self.tokens is None) == (self.passes is None):
            raise ValueError("give either `tokens` or `passes`: the length of the stage")
        natural = self.sources is None and self.buckets is None and self.streams is None and self.temperature is None
        if self.passes is not None and not natural:
            raise ValueError("`passes` needs natural shares; with shares of your own give `tokens`")
        return self


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage, resolved against the data; arrays have one entry for each stream, S in all."""

    first_step: int
    steps: int
    requested: Floats  # (S,) requested token shares, adding up to 1
    rates: Floats  # (S,) packs of the stream in each pack of the mixture, adding up to 1
    offsets: Floats  # (S,) u_i
    start: Ints  # (S,) packs of each stream used before this stage


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Packs of every step of a run: slot n is used n // batch_packs steps after the first stage's first step.

    That step is 0, unless the batch size was changed during the run: see `resumed_at`.
    """

    streams: list[StreamRecord]
    batch_packs: int
    stages: list[Stage]
    orders: list[Order] = field(repr=False)
    end: Ints  # (S,) packs of each stream used by the end of the run

    @property
    def steps(self) -> int:
        return self.stages[-1].first_step + self.stages[-1].steps

    @property
    def first_pack(self) -> Ints:
        """Return the (S,) global ids of the streams' first packs; StreamingDataset numbers all packs consecutively."""
        return offsets_of([stream.packs for stream in self.streams])[:-1]

    def resumed_at(self, *, step: int, slots: int) -> Plan:
        """Return this plan for a run that has used `slots` of it in `step` steps, whatever their batch sizes were.

        The run continues with the next whole batch: no pack repeats, and less than a batch is left for the next pass.
        """
        moved = step - -(-slots // self.batch_packs) - self.stages[0].first_step
        return replace(self, stages=[replace(stage, first_step=stage.first_step + moved) for stage in self.stages])

    def slots_before(self, step: int) -> int:
        """Return the number of slots used by the steps before `step`."""
        return (step - self.stages[0].first_step) * self.batch_packs

    def stage_of(self, step: int) -> int:
        """Return the number of the stage that `step` belongs to, counted from 0."""
        return max(i for i, stage in enumerate(self.stages) if stage.first_step <= step or i == 0)

    def packs(self, start: int, stop: int) -> Ints:
        """Return the (stop - start, batch_packs) global ids of the packs of steps start … stop - 1."""
        rows = []
        for stage in self.stages:
            low, high = max(start, stage.first_step), min(stop, stage.first_step + stage.steps)
            if low < high:
                rows.append(self._stage_packs(stage, low - stage.first_step, high - stage.first_step))
        return np.concatenate(rows) if rows else np.empty((0, self.batch_packs), np.int64)

    def _stage_packs(self, stage: Stage, start: int, stop: int) -> Ints:
        slots = due_order(stage.rates, stage.offsets, start=start * self.batch_packs, stop=stop * self.batch_packs)
        ids = np.empty(len(slots.stream), np.int64)
        first_pack = self.first_pack
        for stream in np.unique(slots.stream):
            at = np.flatnonzero(slots.stream == stream)
            position = int(stage.start[stream]) + int(slots.number[at[0]])
            # A stream's packs are due in its own order, so they are a contiguous part of that order.
            ids[at] = first_pack[stream] + self.orders[stream].take(position, position + len(at))
        return ids.reshape(-1, self.batch_packs)

    def expected_targets(self) -> Floats:
        """Return the (stages, S) targets that each stage takes from each stream, by the stream's mean per pack."""
        per_pack = np.array([stream.targets_per_pack for stream in self.streams])
        starts = [stage.start for stage in self.stages] + [self.end]
        return np.array([(after - before) * per_pack for before, after in itertools.pairwise(starts)])


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Stream of each of consecutive slots, and the number of the pack in the stream's order."""

    stream: Ints
    number: Ints


def due_order(rates: Floats, offsets: Floats, *, start: int, stop: int) -> Slots:
    """Return slots start … stop - 1 of the infinite sequence in which pack j of stream i is due at (j + u_i) / q_i."""
    active = np.flatnonzero(rates > 0)
    q, u = rates[active], offsets[active]
    # At time t, t packs are due, plus or minus one for each stream: no search is needed.
    low = _due_before(max(0.0, float(start - len(active) - 1)), q, u)
    high = _due_before(float(stop + len(active) + 1), q, u)
    stream = np.repeat(np.arange(len(active)), high - low)
    first = offsets_of(high - low)[:-1]
    number = np.arange(len(stream)) - np.repeat(first, high - low) + np.repeat(low, high - low)
    order = np.lexsort((stream, (number + u[stream]) / q[stream]))
    order = order[start - int(low.sum()) :][: stop - start]
    return Slots(stream=active[stream[order]].astype(np.int64), number=number[order].astype(np.int64))


def _due_before(time: float, q: Floats, u: Floats) -> Ints:
    """Count the packs of each stream that are due before `time`, with the floating-point expression that sorts them."""
    count = np.maximum(np.floor(time * q - u).astype(np.int64) - 1, 0)
    while (more := (count + u) / q < time).any():
        count += more
    return count


def count_batch_packs(
    *, batch_tokens: int | None, batch_packs: int | None, pack_tokens: int, world_size: int, where: str
) -> int:
    """Return the packs of a step, a multiple of `world_size`, of which either the tokens or the packs are given.

    Args:
        where: what the names of the settings begin with in an error, such as 'data.'.
    Raises:
        ConfigError: `batch_packs` is not divisible by `world_size`, or a step has more than MOST_BATCH_PACKS.
    """
    if batch_packs is not None:
        packs = batch_packs
        if batch_packs % world_size:
            raise ConfigError(
                f"{where}batch_packs: {batch_packs} packs do not divide among {world_size} processes; "
                f"the nearest that do are {batch_packs // world_size * world_size or world_size} and "
                f"{-(-batch_packs // world_size) * world_size}"
            )
    else:
        assert batch_tokens is not None
        packs = max(1, round(batch_tokens / (pack_tokens * world_size))) * world_size
    if packs > MOST_BATCH_PACKS:
        name = "batch_tokens" if batch_packs is None else "batch_packs"
        raise ConfigError(
            f"{where}{name}: found {batch_packs or batch_tokens:,}, which is {packs:,} packs in a step; expected at "
            f"most {MOST_BATCH_PACKS:,}; lower it"
        )
    return packs


def make_plan(
    stages: Sequence[StageConfig],
    streams: Sequence[StreamRecord],
    *,
    batch_packs: int,
    seed: int,
    block_shards: int,
    share: float = 1.0,
    where: str = "data.stages",
) -> Plan:
    """Resolve the stages against the data.

    Args:
        share: part of every stream's packs to train on, chosen by the seed; the others are never used.
    Raises:
        ConfigError: a name is unknown or missing, the shares cannot be met, no bucket is within the lengths, or the
            run is longer than MOST_PLAN_PACKS.
    """
    streams = list(streams)
    if not streams:
        raise ConfigError(
            "data.path: the data set has no packs to train on, all of them are for validation; build it from more "
            "documents, or with a smaller `validation`"
        )
    orders = _orders(streams, seed=seed, block_shards=block_shards, share=share)
    packs = np.array([order.packs for order in orders], np.int64)
    parts = packs / np.array([stream.packs for stream in streams])
    targets = parts * np.array([stream.targets for stream in streams], np.float64)
    resolved: list[Stage] = []
    first_step, position = 0, np.zeros(len(streams), np.int64)
    # Fractions of a batch left over by earlier stages in passes: only whole batches are trained on.
    carried: dict[bytes, float] = {}
    for i, config in enumerate(stages):
        shares = token_shares(config, streams, targets=targets, where=f"{where}.{i}")
        chosen = shares > 0
        if config.passes is not None:
            rates = np.where(chosen, packs, 0) / packs[chosen].sum()
            window = chosen.tobytes()
            wanted = config.passes * int(packs[chosen].sum()) / batch_packs + carried.get(window, 0.0)
            steps = max(1, int(wanted + 1e-9))
            carried[window] = max(0.0, wanted - steps)
        else:
            assert config.tokens is not None
            rates = np.zeros(len(streams))
            rates[chosen] = shares[chosen] / (targets[chosen] / packs[chosen])
            rates /= rates.sum()
            steps = max(1, round(config.tokens / (batch_packs * float(rates @ (targets / packs)))))
        if (first_step + steps) * batch_packs > MOST_PLAN_PACKS:
            raise ConfigError(
                f"{where}.{i}: by its end the run would read {(first_step + steps) * batch_packs:,} packs; expected at "
                f"most {MOST_PLAN_PACKS:,}; shorten the stage"
            )
        offsets = np.array([fraction(key=f"{seed}/{stream.path}/stage {i}") for stream in streams])
        resolved.append(
            Stage(first_step=first_step, steps=steps, requested=shares, rates=rates, offsets=offsets, start=position)
        )
        position = position + _given(rates, offsets, steps * batch_packs)
        first_step += steps
    return Plan(streams=streams, batch_packs=batch_packs, stages=resolved, orders=orders, end=position)


def _orders(streams: Sequence[StreamRecord], *, seed: int, block_shards: int, share: float) -> list[Order]:
    return [
        stream_order(
            [shard.packs for shard in stream.shards],
            key=f"{seed}/{stream.path}",
            block_shards=block_shards,
            share=share,
        )
        for stream in streams
    ]


def _given(rates: Floats, offsets: Floats, slots: int) -> Ints:
    """Count the packs of each stream in slots 0 … slots - 1."""
    tail = due_order(rates, offsets, start=max(0, slots - 1), stop=slots)
    last_time = (tail.number[-1] + offsets[tail.stream[-1]]) / rates[tail.stream[-1]]
    active = rates > 0
    given = np.zeros(len(rates), np.int64)
    given[active] = _due_before(float(last_time), rates[active], offsets[active])
    # Packs due at exactly the last time are in the order of their streams; the last slot's pack is the last of them.
    ties = np.flatnonzero(active & (np.arange(len(rates)) <= tail.stream[-1]))
    given[ties] += (given[ties] + offsets[ties]) / rates[ties] == last_time
    assert given.sum() == slots
    return given


def token_shares(
    config: MixtureConfig, streams: Sequence[StreamRecord], *, where: str, targets: Floats | None = None
) -> Floats:
    """Return the (S,) requested shares of tokens, adding up to 1; 0 for a stream that is left out.

    Args:
        targets: (S,) tokens that give the natural shares; by default all of each stream.
    Raises:
        ConfigError: see `make_plan`.
    """
    natural = np.array([stream.targets for stream in streams], np.float64) if targets is None else targets
    window = _window(config, streams, where=where)
    natural = natural * window
    if config.streams is not None:
        names = [f"{stream.source}/{stream.bucket}" for stream in streams]
        weights = _named(config.streams, names, window, where=f"{where}.streams")
        return weights / weights.sum()
    sources, source_of = np.unique([stream.source for stream in streams], return_inverse=True)
    buckets, bucket_of = np.unique([stream.bucket for stream in streams], return_inverse=True)
    table = np.zeros((len(sources), len(buckets)))
    np.add.at(table, (source_of, bucket_of), natural)
    table /= table.sum()
    rows = columns = None
    if config.sources is not None:
        rows = _named(config.sources, [str(name) for name in sources], table.sum(1) > 0, where=f"{where}.sources")
    elif config.temperature is not None:
        rows = table.sum(1) ** (1 / config.temperature)
    if config.buckets is not None:
        columns = _named(config.buckets, [str(name) for name in buckets], table.sum(0) > 0, where=f"{where}.buckets")
    table = _fit(table, rows, columns, where=where)
    return table[source_of, bucket_of] * window


def _window(config: MixtureConfig, streams: Sequence[StreamRecord], *, where: str) -> NDArray[np.bool_]:
    """Return (S,) True for the streams whose bucket is within min_length … max_length."""
    low, high = config.min_length or 1, config.max_length or max(stream.upper for stream in streams)
    for stream in streams:
        if max(low, stream.lower) <= min(high, stream.upper) and not (low <= stream.lower and stream.upper <= high):
            raise ConfigError(
                f"{where}: min_length {low}, max_length {high} cut through the bucket {stream.bucket}; "
                "lengths are selected by whole buckets, so use their bounds"
            )
    inside = np.array([low <= stream.lower and stream.upper <= high for stream in streams])
    if not inside.any():
        names = sorted({(stream.lower, stream.bucket) for stream in streams})
        raise ConfigError(
            f"{where}: no bucket within min_length {low}, max_length {high}; there are {', '.join(n for _, n in names)}"
        )
    return inside


def _named(weights: dict[str, float], names: list[str], present: NDArray[np.bool_], *, where: str) -> Floats:
    """Return weights in the order of `names`; every present name must be given, and only those may be above 0."""
    there = {name for name, is_present in zip(names, present, strict=True) if is_present}
    unknown = [name for name, weight in weights.items() if name not in there and (weight > 0 or name not in names)]
    if unknown:
        raise ConfigError(
            f"{where}.{unknown[0]}: not in this selection of the data; there are {', '.join(sorted(there))}"
        )
    missing = sorted(there - set(weights))
    if missing:
        raise ConfigError(f"{where}: no share for {missing[0]!r}; name every one; 0 leaves it out")
    if not math.isfinite(sum(weights.values())):
        raise ConfigError(f"{where}: the shares are too large to be added; give numbers near 1")
    return np.array([weights.get(name, 0.0) for name in names])


def _fit(table: Floats, rows: Floats | None, columns: Floats | None, *, where: str) -> Floats:
    """Scale rows and columns of the natural shares until both sums are as requested (iterative proportional fitting).

    Among all shares with those sums, the result is nearest to the natural ones (in relative entropy).
    """
    rows = None if rows is None else rows / rows.sum()
    columns = None if columns is None else columns / columns.sum()
    for _ in range(2000):
        if rows is not None:
            sums = table.sum(1)
            table = table * np.divide(rows, sums, out=np.zeros_like(sums), where=sums > 0)[:, None]
        if columns is not None:
            sums = table.sum(0)
            table = table * np.divide(columns, sums, out=np.zeros_like(sums), where=sums > 0)[None, :]
        errors = [0.0 if rows is None else np.abs(table.sum(1) - rows).max()]
        errors.append(0.0 if columns is None else np.abs(table.sum(0) - columns).max())
        if max(errors) < 1e-12:
            return table / table.sum()
    if max(errors) > 1e-6:
        raise ConfigError(
            f"{where}: no mixture meets both the shares of sources and those of buckets, since some sources have "
            "nothing in some buckets; loosen one of them, or give `streams`"
        )
    return table / table.sum()
