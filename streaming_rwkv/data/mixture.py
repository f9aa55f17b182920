"""Which packs each step trains on: token shares from the user, pack rates from the manifest, then pure arithmetic.

A user asks for shares of *tokens*, by source, by bucket, or by stream. Streams differ in tokens per pack, so shares
of tokens become rates of packs. Stream i with rate q_i has its j-th pack due at time (j + u_i) / q_i with a seeded
offset u_i; packs are trained on in order of their due times. So at any moment each stream is within a few packs of
its share, every batch is mixed alike, and which pack fills slot n can be computed for any n without walking there.
With natural rates (packs of the stream / packs in all) each run through all slots sees each pack exactly once.

A stream's position only ever grows, across passes and stages: nothing is seen twice before all was seen once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from streaming_rwkv.config import Config, ConfigError
from streaming_rwkv.data.order import Ints, StreamOrder, fraction
from streaming_rwkv.shards import StreamRecord

Floats = NDArray[np.float64]
ORDER_VERSION = 2  # raised when the same configuration would give another order; checkpoints carry it


class MixtureConfig(Config):
    """Shares of tokens; what is not said stays natural (in proportion to the tokens there are)."""

    sources: dict[str, float] | None = None
    """Token share of each source; every source must be named, 0 leaves one out."""
    buckets: dict[str, float] | None = None
    """Token share of each bucket ('1-256'); every bucket in the window must be named, 0 leaves one out."""
    streams: dict[str, float] | None = None
    """Token share of each 'source/bucket'; excludes the other three ways."""
    temperature: float | None = Field(default=None, gt=0)
    """Shares of sources in proportion to tokens ** (1 / temperature): above 1 lifts the small ones."""
    min_length: int | None = None
    """Only buckets of documents at least so long; a bound that cuts through a bucket is refused."""
    max_length: int | None = None
    """Only buckets of documents at most so long; likewise."""

    @model_validator(mode="after")
    def _one_way(self) -> MixtureConfig:
        if self.streams is not None and (self.sources or self.buckets or self.temperature):
            raise ValueError("`streams` says every share; it cannot be combined with sources, buckets or temperature")
        if self.sources is not None and self.temperature is not None:
            raise ValueError("`sources` and `temperature` both say the shares of sources; keep one")
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
                f"`min_length`: found {self.min_length}, above `max_length` {self.max_length}; no document lies between"
            )
        return self


class StageConfig(MixtureConfig):
    """A stretch of the run with one mixture, so many tokens or so many passes over the data long."""

    tokens: int | None = Field(default=None, gt=0)
    """How long it is; either this or `passes`."""
    passes: float | None = Field(default=None, gt=0)
    """How often all in its window is seen; shares are then natural."""

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
    requested: Floats  # (S,) token shares as asked for, adding up to 1
    rates: Floats  # (S,) packs of the stream in each pack of the mixture, adding up to 1
    offsets: Floats  # (S,) u_i
    start: Ints  # (S,) packs that each stream gave before this stage


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole run: slot n lies n // batch_packs steps after the first stage's first.

    That is step 0, unless the batch size was changed on the way: see `going_on`.
    """

    streams: list[StreamRecord]
    batch_packs: int
    stages: list[Stage]
    orders: list[StreamOrder] = field(repr=False)
    end: Ints  # (S,) packs that each stream has given at the end of the run

    @property
    def steps(self) -> int:
        return self.stages[-1].first_step + self.stages[-1].steps

    @property
    def first_pack(self) -> Ints:
        """(S,) global id of each stream's first pack: streams lie one after another, as StreamingDataset has them."""
        packs = np.array([stream.packs for stream in self.streams], np.int64)
        return np.cumsum(packs) - packs

    def going_on(self, *, step: int, slots: int) -> Plan:
        """The same plan for a run that has filled `slots` of it in `step` steps, whatever their batches were.

        It goes on with the next whole batch: nothing comes again, and less than a batch is left for the next pass.
        """
        moved = step - -(-slots // self.batch_packs) - self.stages[0].first_step
        return replace(self, stages=[replace(stage, first_step=stage.first_step + moved) for stage in self.stages])

    def slots_before(self, step: int) -> int:
        return (step - self.stages[0].first_step) * self.batch_packs

    def stage_of(self, step: int) -> int:
        return max(i for i, stage in enumerate(self.stages) if stage.first_step <= step or i == 0)

    def packs(self, start: int, stop: int) -> Ints:
        """(stop - start, batch_packs) global ids of the packs of steps start … stop - 1."""
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
            # A stream's own packs come due one after another, so they are a contiguous part of its walk.
            ids[at] = first_pack[stream] + self.orders[stream].take(position, position + len(at))
        return ids.reshape(-1, self.batch_packs)

    def expected_targets(self) -> Floats:
        """(stages, S) targets that each stage draws from each stream, by the stream's mean."""
        per_pack = np.array([stream.targets_per_pack for stream in self.streams])
        starts = [stage.start for stage in self.stages] + [self.end]
        return np.array([(after - before) * per_pack for before, after in itertools.pairwise(starts)])


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Consecutive slots: which stream fills each, and with its how-manieth pack."""

    stream: Ints
    number: Ints


def due_order(rates: Floats, offsets: Floats, *, start: int, stop: int) -> Slots:
    """Slots start … stop - 1 of the endless sequence in which pack j of stream i is due at (j + u_i) / q_i."""
    active = np.flatnonzero(rates > 0)
    q, u = rates[active], offsets[active]
    # At time t about t packs were due, give or take one for each stream: no search is needed.
    low = _due_before(max(0.0, float(start - len(active) - 1)), q, u)
    high = _due_before(float(stop + len(active) + 1), q, u)
    stream = np.repeat(np.arange(len(active)), high - low)
    first = np.cumsum(high - low) - (high - low)
    number = np.arange(len(stream)) - np.repeat(first, high - low) + np.repeat(low, high - low)
    order = np.lexsort((stream, (number + u[stream]) / q[stream]))
    order = order[start - int(low.sum()) :][: stop - start]
    return Slots(stream=active[stream[order]].astype(np.int64), number=number[order].astype(np.int64))


def _due_before(time: float, q: Floats, u: Floats) -> Ints:
    """How many packs of each stream are due before `time`, by the very floating-point expression that sorts them."""
    count = np.maximum(np.floor(time * q - u).astype(np.int64) - 1, 0)
    while (more := (count + u) / q < time).any():
        count += more
    return count


def make_plan(
    stages: Sequence[StageConfig],
    streams: Sequence[StreamRecord],
    *,
    batch_packs: int,
    seed: int,
    block_shards: int,
    where: str = "data.stages",
) -> Plan:
    """Resolve the stages against the data.

    Raises:
        ConfigError: a name that is not there or not given, shares that no data can meet, a window without buckets.
    """
    streams = list(streams)
    if not streams:
        raise ConfigError(
            "data.path: the data set has no packs to train on, all of them are for validation; build it from more "
            "documents, or with a smaller `validation`"
        )
    packs = np.array([stream.packs for stream in streams], np.int64)
    targets = np.array([stream.targets for stream in streams], np.float64)
    resolved: list[Stage] = []
    first_step, position = 0, np.zeros(len(streams), np.int64)
    # Batches that earlier stages in passes left over of their streams, since only whole ones are trained on.
    carried: dict[bytes, float] = {}
    for i, config in enumerate(stages):
        shares = token_shares(config, streams, where=f"{where}.{i}")
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
        offsets = np.array([fraction(key=f"{seed}/{stream.path}/stage {i}") for stream in streams])
        resolved.append(
            Stage(first_step=first_step, steps=steps, requested=shares, rates=rates, offsets=offsets, start=position)
        )
        position = position + _given(rates, offsets, steps * batch_packs)
        first_step += steps
    orders = [
        StreamOrder([s.packs for s in stream.shards], key=f"{seed}/{stream.path}", block_shards=block_shards)
        for stream in streams
    ]
    return Plan(streams=streams, batch_packs=batch_packs, stages=resolved, orders=orders, end=position)


def _given(rates: Floats, offsets: Floats, slots: int) -> Ints:
    """How many packs each stream gives to slots 0 … slots - 1."""
    tail = due_order(rates, offsets, start=max(0, slots - 1), stop=slots)
    last_time = (tail.number[-1] + offsets[tail.stream[-1]]) / rates[tail.stream[-1]]
    active = rates > 0
    given = np.zeros(len(rates), np.int64)
    given[active] = _due_before(float(last_time), rates[active], offsets[active])
    # Packs due at exactly the last time come in the order of their streams; the last slot's own is the last of them.
    ties = np.flatnonzero(active & (np.arange(len(rates)) <= tail.stream[-1]))
    given[ties] += (given[ties] + offsets[ties]) / rates[ties] == last_time
    assert given.sum() == slots
    return given


def token_shares(config: MixtureConfig, streams: Sequence[StreamRecord], *, where: str) -> Floats:
    """(S,) requested shares of tokens, adding up to 1; 0 for a stream that is left out.

    Raises:
        ConfigError: see `make_plan`.
    """
    natural = np.array([stream.targets for stream in streams], np.float64)
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
    """(S,) which streams have a bucket that lies within min_length … max_length."""
    low, high = config.min_length or 1, config.max_length or max(stream.upper for stream in streams)
    for stream in streams:
        if max(low, stream.lower) <= min(high, stream.upper) and not (low <= stream.lower and stream.upper <= high):
            raise ConfigError(
                f"{where}: min_length {low}, max_length {high} cut through the bucket {stream.bucket}; "
                "lengths are selected by whole buckets, so choose bounds of theirs"
            )
    inside = np.array([low <= stream.lower and stream.upper <= high for stream in streams])
    if not inside.any():
        names = sorted({(stream.lower, stream.bucket) for stream in streams})
        raise ConfigError(
            f"{where}: no bucket within min_length {low}, max_length {high}; there are {', '.join(n for _, n in names)}"
        )
    return inside


def _named(weights: dict[str, float], names: list[str], present: NDArray[np.bool_], *, where: str) -> Floats:
    """Weights in the order of `names`; each that is present must be given, and only those may weigh anything."""
    there = {name for name, is_present in zip(names, present, strict=True) if is_present}
    unknown = [name for name, weight in weights.items() if name not in there and (weight > 0 or name not in names)]
    if unknown:
        raise ConfigError(
            f"{where}.{unknown[0]}: not in this selection of the data; there are {', '.join(sorted(there))}"
        )
    missing = sorted(there - set(weights))
    if missing:
        raise ConfigError(f"{where}: no share for {missing[0]!r}; name every one, 0 leaves it out")
    return np.array([weights.get(name, 0.0) for name in names])


def _fit(table: Floats, rows: Floats | None, columns: Floats | None, *, where: str) -> Floats:
    """Scale rows and columns of the natural shares until both sums are as asked for (iterative proportional fitting).

    Within those sums the shares stay as near to natural as they can (in relative entropy).
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
