"""Number of packs in a microbatch, found by trial before training on a model of the same shape.

Composer's own `auto` does not work with FSDP2. Here each trial builds a new network with zero weights, sharded as in
training, allocates the optimizer's memory, and runs forward and backward over full packs. A trial that does not fit
leaves nothing behind: no gathered weights, no gradients, no change of the random numbers.

Ranks must agree, and must fail together: one that runs out of memory alone would leave the others waiting in a
collective. So all ranks are limited to the same number of bytes, the least that any of them has free, and do the same
allocations. Should their results still differ, the collectives' timeout ends the run; a number in the configuration
avoids the trial.
"""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from composer.core import Precision, get_precision_context
from composer.devices import Device
from composer.distributed.prepare_distributed import parallelize_composer_model
from torch.distributed.device_mesh import DeviceMesh

from streaming_rwkv.config import UserError
from streaming_rwkv.console import print_rich
from streaming_rwkv.data.batch import Batch
from streaming_rwkv.distributed import all_reduce_min, broadcast_object, is_rank_zero, world_size
from streaming_rwkv.filesystem import read_regular_file, write_atomically
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.outputs import LARGEST_RECORD_BYTES, MICROBATCH_NAME
from streaming_rwkv.shards import StreamRecord
from streaming_rwkv.train.composer_model import RWKV7ForTraining, sharding
from streaming_rwkv.train.prepare import PreparedRun

logger = logging.getLogger(__name__)

# Share of the free memory; the rest is for fragmentation, NCCL's buffers and the sums of evaluations.
USABLE = 0.92


class MicrobatchError(UserError):
    """The smallest microbatch does not fit into memory."""


def choose_microbatch(prepared: PreparedRun, *, precision: str, device: Device, mesh: DeviceMesh | None) -> int:
    """Return the packs of one pass on each process: as configured, all of a step, or on a GPU as many as fit."""
    config, manifest = prepared.config, prepared.shard_set.manifest
    per_process = prepared.plan.batch_packs // world_size()
    if isinstance(config.microbatch_packs, int):
        return config.microbatch_packs
    if config.microbatch_packs is None or device.name != "gpu":
        return per_process
    pieces_per_pack = densest_pack(prepared.plan.streams, pack_tokens=manifest.pack_tokens)
    conditions = {
        "packs": per_process,
        "pack_tokens": manifest.pack_tokens,
        "pieces_per_pack": pieces_per_pack,
        "precision": precision,
        "model": prepared.model.model_dump(mode="json"),
        "processes": world_size(),
        **({"replicas": config.parallel.replicas} if config.parallel.replicas > 1 else {}),
        "device": torch.cuda.get_device_name(),
    }
    found = remembered_microbatch(
        Path(config.save_folder),
        conditions,
        lambda: probe_microbatch(
            prepared.model,
            packs=per_process,
            pack_tokens=manifest.pack_tokens,
            pieces_per_pack=pieces_per_pack,
            precision=Precision(precision),
            device=torch.device("cuda", torch.cuda.current_device()),
            mesh=mesh,
        ),
    )
    if is_rank_zero():
        print_rich(f"microbatches of {found} packs, of {per_process} on each process (microbatch_packs: auto)")
    return found


def probe_microbatch(
    config: RWKV7Config,
    *,
    packs: int,
    pack_tokens: int,
    pieces_per_pack: int,
    precision: Precision,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> int:
    """Return the most packs, halving from `packs`, whose forward and backward passes fit on every rank. Collective.

    Args:
        packs: of a step, on each rank.
        pieces_per_pack: documents in a pack; each has its own state in the kernel.
        mesh: ranks as replicas × shards; None for a single process.
    Raises:
        MicrobatchError: one pack does not fit.
    """

    def trial(microbatch: int) -> None:
        batch = full_batch(packs=microbatch, pack_tokens=pack_tokens, pieces_per_pack=pieces_per_pack, device=device)
        # During a second pass the gradients of the first are in memory too.
        passes = min(2, math.ceil(packs / microbatch))
        run_trial(config, batch, passes=passes, precision=precision, device=device, mesh=mesh)

    # Building a network uses random numbers.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), same_budget(device):
        found = largest_that_fits(packs, trial=trial, device=device)
    if found is None:
        raise MicrobatchError(
            f"microbatch_packs: not even one pack of {pack_tokens:,} tokens fits into this device's memory; set "
            "model.activation_checkpointing=true, use more processes or a smaller model, or build with smaller packs"
        )
    return found


def largest_that_fits(packs: int, *, trial: Callable[[int], None], device: torch.device) -> int | None:
    """Halve `packs` until `trial` fits into memory on all ranks; return None if 1 does not fit."""
    while packs >= 1:
        fits = torch.tensor(float(_fits(trial, packs)), device=device)
        release(device)
        if all_reduce_min(fits).item():
            return packs
        logger.info("microbatches of %d packs do not fit", packs)
        packs //= 2
    return None


def _fits(trial: Callable[[int], None], packs: int) -> bool:
    try:
        trial(packs)
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:
        if "ALLOC_FAILED" in str(error):  # cuBLAS's message
            return False
        raise
    return True


def release(device: torch.device) -> None:
    """Free the memory that a trial, or its traceback, held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def same_budget(device: torch.device) -> Iterator[None]:
    """Limit this rank's allocator to the least that any rank has free; no effect on the CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    budget = torch.tensor(float(free + torch.cuda.memory_reserved(device)), device=device, dtype=torch.float64)
    all_reduce_min(budget)
    torch.cuda.set_per_process_memory_fraction(USABLE * budget.item() / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def full_batch(*, packs: int, pack_tokens: int, pieces_per_pack: int, device: torch.device) -> Batch:
    """Return packs that are completely full, of pieces of equal length: no batch of the run is larger."""
    tokens = packs * pack_tokens
    pieces = [round(piece * pack_tokens / pieces_per_pack) for piece in range(pieces_per_pack)]
    starts = [pack * pack_tokens + piece for pack in range(packs) for piece in pieces]
    return {
        "tokens": torch.zeros(1, tokens, dtype=torch.int64, device=device),
        "targets": torch.zeros(1, tokens, dtype=torch.int64, device=device),
        "cu_seqlens": torch.tensor([*starts, tokens], dtype=torch.int32, device=device),
        "pack_starts": torch.arange(packs + 1, dtype=torch.int32, device=device) * pack_tokens,
        "streams": torch.zeros(packs, dtype=torch.int64, device=device),
        "text_bytes": torch.zeros(packs, dtype=torch.int64, device=device),
        "num_targets": tokens,
    }


def run_trial(
    config: RWKV7Config,
    batch: Batch,
    *,
    passes: int,
    precision: Precision,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> None:
    """Run forward and backward on a network of zeros, with the memory of AdamW's moments allocated."""
    model = RWKV7ForTraining(RWKV7(config), num_streams=1, flops_per_token=1)
    if mesh is not None:
        parallelize_composer_model(model, None, sharding(mesh), precision=precision)
    else:
        model.to(device)
    moments = [torch.zeros_like(parameter) for parameter in model.parameters() for _ in range(2)]
    for _ in range(passes):
        with get_precision_context(precision):
            loss = model.loss(model(batch), batch)
        loss.backward()
    del moments  # keeps them in memory until here
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # raises errors of the device here


def densest_pack(records: Sequence[StreamRecord], *, pack_tokens: int) -> int:
    """Return the documents to allow for in a pack: twice the mean of the stream with the shortest documents."""
    return min(pack_tokens, max(math.ceil(2 * record.pieces / record.packs) for record in records))


def remembered_microbatch(save_folder: Path, conditions: dict[str, object], probe: Callable[[], int]) -> int:
    """Return the result of an earlier start under the same conditions, otherwise that of `probe`. Collective.

    A resumed run then rounds like an uninterrupted one, and does not repeat the trials.
    """
    path = save_folder / MICROBATCH_NAME
    known = 0
    if is_rank_zero():
        with suppress(
            FileNotFoundError, ValueError, LookupError, TypeError, RecursionError
        ):  # a damaged record is none
            record = json.loads(read_regular_file(path, most=LARGEST_RECORD_BYTES, follow=False))
            if record["conditions"] == conditions and type(record["packs"]) is int and record["packs"] > 0:
                known = record["packs"]
    if known := broadcast_object(known):
        return known
    packs = probe()
    if is_rank_zero():
        write_atomically(path, json.dumps({"packs": packs, "conditions": conditions}, indent=1).encode())
    return packs
