"""Memory that a run needs in each process: an estimate to plan with, and checks of it against what there is."""

from __future__ import annotations

from dataclasses import dataclass

from streaming_rwkv.config import ConfigError
from streaming_rwkv.console import shown_bytes
from streaming_rwkv.limits import memory_limit
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.flops import parameter_count
from streaming_rwkv.ops import cpp, cuda, cuda_chunked
from streaming_rwkv.ops.time_mixing import HEAD_SIZE
from streaming_rwkv.train.prepare import PreparedRun

# Bytes that autograd saves of a layer for each token and channel, counted by its hooks (tests/train/test_preview.py),
# without the states that the kernel saves.
SAVED_BYTES = {"fp32": 79, "amp_bf16": 47}
INPUT_BYTES = {"fp32": 8, "amp_bf16": 6}  # the block's inputs, all that activation checkpointing keeps
LARGEST_GPU_BYTES = 1 << 40  # more than any GPU has


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """What a process holds during a step, with the microbatch that it is for.

    Fields:
        packs: of a microbatch; an upper bound where the largest that fits is found by trial.
        tokens: of a microbatch.
        state: bytes of weights, gradients and moments.
        activations: bytes, estimated.
    """

    packs: int
    tokens: int
    precision: str
    state: int
    activations: int


def memory_need(prepared: PreparedRun, *, processes: int, device: str) -> MemoryNeed:
    """Return what each of `processes` needs on its `device`, "cpu" or "gpu"."""
    config, model = prepared.config, prepared.model
    per_process, given = prepared.plan.batch_packs // processes, config.microbatch_packs
    packs = min(given, per_process) if isinstance(given, int) else per_process
    tokens = packs * prepared.shard_set.manifest.pack_tokens
    precision = config.precision or ("fp32" if device == "cpu" else "amp_bf16")
    return MemoryNeed(
        packs=packs,
        tokens=tokens,
        precision=precision,
        state=state_bytes(model, shards=processes // config.parallel.replicas),
        activations=activation_bytes(model, tokens=tokens, precision=precision, processes=processes, device=device),
    )


def check_memory(prepared: PreparedRun, *, processes: int, device: str, is_planned: bool) -> None:
    """Refuse a network that cannot be in memory, and on the CPU a microbatch that cannot.

    On a GPU, where memory ends with an error that can be explained, a trial finds the microbatch.

    Args:
        device: "cpu" or "gpu".
        is_planned: the run is planned here for another machine, whose memory is not known, unless it is on the CPU.
    Raises:
        ConfigError: names the network or the batch, and the memory.
    """
    shards = processes // prepared.config.parallel.replicas
    check_network_fits(prepared.model, shards=shards, device=device, is_planned=is_planned)
    need, (limit, name) = memory_need(prepared, processes=processes, device=device), memory_limit()
    if device == "cpu" and need.state + need.activations > limit:
        smaller = "microbatch_packs (one step then has several)" if need.packs > 1 else "model"
        raise ConfigError(
            f"data: a microbatch of {need.packs:,} packs ({need.tokens:,} tokens) needs about "
            f"{shown_bytes(need.state + need.activations)} in each process, but there are only {shown_bytes(limit)} "
            f"({name}); make {smaller} or `data.batch_tokens` smaller, or use more processes"
        )


def state_bytes(config: RWKV7Config, *, shards: int) -> int:
    """Return the bytes of one shard of weights, gradients and AdamW's two moments, float32."""
    return 16 * parameter_count(config) // shards


def check_network_fits(config: RWKV7Config, *, shards: int, device: str, is_planned: bool) -> None:
    """Refuse a network that cannot be in memory.

    Args:
        device: "cpu" or "gpu".
        is_planned: the run is planned here for another machine, whose memory is not known, unless it is on the CPU.
    Raises:
        ConfigError: names the number of parameters, and the memory.
    """
    state = state_bytes(config, shards=shards)
    weights = 4 * parameter_count(config)  # every process builds the whole network before it is sharded
    checks = [(weights if device == "gpu" else max(state, weights), *memory_limit())]
    if device == "gpu":
        checks = [(state, LARGEST_GPU_BYTES, "more than any GPU has"), *([] if is_planned else checks)]
    for least, limit, name in checks:
        if least > limit:
            raise ConfigError(
                f"model: {parameter_count(config):,} parameters ({config.num_layers} layers of {config.hidden_size}, "
                f"vocabulary {config.vocab_size:,}) need at least {shown_bytes(least)} in each process, but there are "
                f"only {shown_bytes(limit)} ({name}); make the model smaller, or use more processes"
            )


def activation_bytes(config: RWKV7Config, *, tokens: int, precision: str, processes: int, device: str) -> int:
    """Estimate the bytes of activations of a microbatch of `tokens` at the end of its forward pass.

        layers   T·C·79 B in float32, 47 B with bf16 autocast, and the kernel's states, 4 B on the CPU, on a GPU 16 B in
                 float32; in bf16 they take the place of 4 B among the 47; with autocast their weights in bf16; with
                 checkpointing T·C·8 B or 6 B for each and one layer's in full
        head     a buffer of chunk·V in the products' type, its weight's gradient of V·C, and 8 B·T·C round it
        gathered with FSDP, embedding, head and one layer whole, float32

    Fragmentation, communication buffers and the CUDA context are not included.
    """
    row = tokens * config.hidden_size
    match device, precision:
        case "cpu", _:
            states = 4 * HEAD_SIZE // cpp.SAVED_EVERY
        case _, "fp32":
            states = 4 * HEAD_SIZE // cuda.SAVED_EVERY
        case _:  # halves, and no `removed`, which SAVED_BYTES counts with 4
            states = 2 * HEAD_SIZE // cuda_chunked.SAVED_EVERY - 4
    saved, layers = SAVED_BYTES[precision] + states, config.num_layers
    words = config.vocab_size * config.hidden_size
    per_layer = (parameter_count(config) - 2 * words) // layers
    layer = row * saved + (2 * per_layer if precision == "amp_bf16" else 0)
    kept = layers * row * INPUT_BYTES[precision] + layer if config.activation_checkpointing else layers * layer
    element = 2 if precision == "amp_bf16" else 4
    head = element * min(config.loss_chunk_tokens, tokens) * config.vocab_size + 4 * words + 8 * row
    return kept + head + (4 * (2 * words + per_layer) if processes > 1 else 0)
