"""Preview of a run: its mixture, its costs, and one batch as the model will see it."""

from __future__ import annotations

import itertools
import time

import numpy as np
import torch
from rich.table import Table

from streaming_rwkv.console import shown_bytes, shown_duration
from streaming_rwkv.data.batch import Batch
from streaming_rwkv.data.mixture import Plan
from streaming_rwkv.model.flops import flops_per_token, parameter_count, peak_flops
from streaming_rwkv.ops.layer_reference import IGNORED
from streaming_rwkv.tokenizer import Tokenizer
from streaming_rwkv.train.memory import memory_need
from streaming_rwkv.train.prepare import PreparedRun

# Shares of the peak that runs have reached: the fused kernels on a GPU, small models on a CPU.
UTILIZATION = {"gpu": 0.35, "cpu": 0.3}
SHOWN_DOCUMENTS = 8
EDGE_TOKENS = 4


def mixture_table(plan: Plan, *, max_repeats: float) -> Table:
    """Return a table of each stream's requested and effective token shares by stage, and its number of passes."""
    targets = plan.expected_targets()
    packs = np.array([order.packs for order in plan.orders])
    repeats = plan.end / packs
    table = Table(title="Mixture: shares of tokens, requested → effective", title_justify="left")
    table.add_column("source", overflow="fold")
    for name in ("bucket", "tokens", "packs"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, stage in enumerate(plan.stages):
        name = f"stage {i} " if len(plan.stages) > 1 else ""
        table.add_column(f"{name}({counted(stage.steps, 'step')})", justify="right")
    table.add_column("seen", justify="right")
    for s, stream in enumerate(plan.streams):
        shares = [
            f"{stage.requested[s]:.2%} → {targets[i, s] / targets[i].sum():.2%}" if stage.requested[s] else "–"
            for i, stage in enumerate(plan.stages)
        ]
        seen = f"{repeats[s]:.2f}×" + (" !" if repeats[s] > max_repeats else "") if plan.end[s] else "never"
        table.add_row(
            stream.source,
            stream.bucket,
            f"{round(packs[s] * stream.targets_per_pack):,}",
            f"{packs[s]:,}",
            *shares,
            seen,
        )
    too_often = [
        f"{s.source}/{s.bucket}" for s, times in zip(plan.streams, repeats, strict=True) if times > max_repeats
    ]
    if too_often:
        table.caption = (
            f"! seen more than data.max_repeats = {max_repeats:g} times: {', '.join(too_often)}; "
            "lower their share, or train on fewer tokens"
        )
    return table


def checkpoint_steps(*, steps: int, interval: int, first: int = 0) -> list[int]:
    """Return the steps after which a checkpoint is written: every `interval` steps, and the last."""
    return sorted(
        {*range(interval * (first // interval + 1), steps + 1, interval), *({steps} if first < steps else ())}
    )


def summary_table(prepared: PreparedRun, *, processes: int, first_step: int) -> Table:
    """Return a table of steps, tokens, parameters, FLOPs, memory per process, and remaining checkpoints."""
    config, plan, model = prepared.config, prepared.plan, prepared.model
    per_process = plan.batch_packs // processes
    device = config.device or "gpu"  # a run is often planned on a machine without a GPU
    need = memory_need(prepared, processes=processes, device=device)
    shards, replicas = processes // config.parallel.replicas, config.parallel.replicas
    divided = f" (one of {shards} shards{f', {replicas} replicas' if replicas > 1 else ''})" if processes > 1 else ""
    flops = flops_per_token(model)
    steps = checkpoint_steps(steps=plan.steps, interval=config.checkpoint.interval_steps, first=first_step)
    shown = ", ".join(map(str, steps if len(steps) <= 6 else [*steps[:3], "…", *steps[-2:]]))
    each = 12 * parameter_count(model)
    kept, every = set(steps[-config.checkpoint.keep :]), config.checkpoint.keep_every
    keep = len(kept | {step for step in steps if every and step % every == 0})
    written = f"after steps {shown}; about {shown_bytes(each)} each, {keep} kept: {shown_bytes(keep * each)}"
    if len(steps) == 1:
        written = f"after step {shown}; about {shown_bytes(each)}"
    on = "the CPU" if device == "cpu" else "a GPU"
    if config.device is None and not torch.cuda.is_available():
        on += ", though none is here: device=cpu shows the CPU's"
    table = Table(title="The run", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in {
        "begins at": f"step {first_step}" + (" (a checkpoint is there)" if first_step else ""),
        "steps": f"{plan.steps:,}, each of {counted(plan.batch_packs, 'pack')}, about "
        f"{prepared.total_tokens // plan.steps:,} tokens",
        "tokens": f"{prepared.total_tokens:,}",
        "processes": f"{processes}, each with {counted(per_process, 'pack')} of a step, {need.packs} in a microbatch",
        "parameters": f"{parameter_count(model):,} ({model.num_layers} layers of {model.hidden_size}, "
        f"vocabulary {model.vocab_size:,})",
        "FLOPs": f"{engineering(flops)} per token, {engineering(flops * prepared.total_tokens)} in all",
        "memory, each": f"{shown_bytes(need.state + need.activations)} on {on}; weights, gradients, moments in float32 "
        f"{shown_bytes(need.state)}{divided}, activations of {need.tokens:,} tokens in {need.precision} about "
        f"{shown_bytes(need.activations)} (estimated)",
        "time": _time(
            flops * prepared.total_tokens * (1 - first_step / plan.steps), device=device, processes=processes
        ),
        "checkpoints": f"{len(steps)} to come, {written}" if steps else "none to come",
        "disk": f"about {shown_bytes(_cache_bytes(prepared))} for the cache of shards, {shown_bytes(keep * each)} for "
        "checkpoints",
    }.items():
        table.add_row(name, value)
    return table


def counted(number: int, name: str) -> str:
    """Return a number and its noun: 1 pack, 2 packs."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def engineering(number: float) -> str:
    """Return a number with three digits and a unit: 9.68 M, 6.2 T."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g}"


def _cache_bytes(prepared: PreparedRun) -> int:
    """Return the size of the shards that the run reads, compressed and decompressed."""
    plan = prepared.plan
    used = (stream for stream, packs in zip(plan.streams, plan.end, strict=True) if packs)
    size = sum(shard.raw_bytes + shard.bytes for stream in used for shard in stream.shards)
    return min(size, prepared.config.data.cache_limit or size)


def _time(flops: float, *, device: str, processes: int) -> str:
    """Return an estimate of the time of training, evaluations and checkpoints not included."""
    if device == "cpu":
        peak, what = _cpu_flops(), "products of matrices here"
    elif torch.cuda.is_available() and (found := peak_flops(name := torch.cuda.get_device_name())):
        peak, what = found * processes, f"the peak of {counted(processes, name)}"
    else:
        return "unknown: this machine has no GPU whose speed is known"
    return f"about {shown_duration(flops / (UTILIZATION[device] * peak))}, at {UTILIZATION[device]:.0%} of {what}"


def _cpu_flops() -> float:
    """Measure products of matrices on this machine, in FLOP/s."""
    size = 512
    left, seconds = torch.ones(size, size), []
    for _ in range(5):
        began = time.perf_counter()
        left @ left
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / max(min(seconds), 1e-9)


def batch_table(batch: Batch, plan: Plan, tokenizer: Tokenizer, *, step: int) -> Table:
    """Return a table of the first documents of a batch: their positions, and their first and last input → target."""
    tokens, targets = batch["tokens"][0].tolist(), batch["targets"][0].tolist()
    bounds, packs = batch["cu_seqlens"].tolist(), batch["pack_starts"].tolist()
    pieces = len(bounds) - 1
    table = Table(
        title=f"Batch of step {step}: {counted(len(packs) - 1, 'pack')}, {counted(pieces, 'document')}, "
        f"{len(tokens):,} inputs, "
        f"{batch['num_targets']:,} targets; input → target",
        title_justify="left",
        show_lines=True,
    )
    table.add_column("pack", justify="right")
    table.add_column("stream", overflow="fold")
    table.add_column("inputs", justify="right")
    table.add_column("begins", overflow="fold")
    table.add_column("ends", overflow="fold")

    def word(token: int, marks: dict[int, str]) -> str:
        return "ignored" if token == IGNORED else f"{token} {marks.get(token) or repr(tokenizer.decode([token]))}"

    # Both may have the same id, but a document's begin is never a target, nor its end an input.
    begin, end = {tokenizer.bos_id: "⟨bos⟩"}, {tokenizer.eos_id: "⟨eos⟩"}

    def pairs(low: int, high: int) -> str:
        return "\n".join(f"{word(tokens[i], begin)} → {word(targets[i], end)}" for i in range(low, high))

    for low, high in itertools.pairwise(bounds[: SHOWN_DOCUMENTS + 1]):
        pack = int(np.searchsorted(packs, low, side="right")) - 1
        record = plan.streams[int(batch["streams"][pack])]
        edge = min(high, low + EDGE_TOKENS)
        middle = max(edge, high - EDGE_TOKENS)
        table.add_row(
            str(pack), f"{record.source}/{record.bucket}", f"{low} … {high - 1}", pairs(low, edge), pairs(middle, high)
        )
    if pieces > SHOWN_DOCUMENTS:
        table.caption = f"and {pieces - SHOWN_DOCUMENTS} more documents"
    return table
