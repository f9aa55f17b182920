"""The microbatch is halved until a real forward and backward pass fits, and nothing of the run is touched by it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Precision
from composer.devices import DeviceCPU
from torch.nn.modules.module import register_module_forward_hook

from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.head import Head
from streaming_rwkv.model.rwkv7 import Block
from streaming_rwkv.shards import ShardRecord, StreamRecord
from streaming_rwkv.train.microbatch import (
    MicrobatchError,
    choose_microbatch,
    densest_pack,
    full_batch,
    largest_that_fits,
    probe_microbatch,
    remembered_microbatch,
)
from tests.fork_server import ForkServer

CPU = torch.device("cpu")
CONFIG = RWKV7Config(vocab_size=20, hidden_size=64, num_layers=2)


@contextmanager
def memory_for(tokens: int, *, in_backward: bool = False) -> Iterator[list[int]]:
    """A machine that runs out of memory in the middle of a pass over more tokens; gives the tokens of each pass."""
    passes: list[int] = []

    def fail(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("injected")

    def forward(module: torch.nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, Head):
            passes.append(args[0].shape[1])
        if isinstance(module, Block) and args[0].shape[1] > tokens:
            if not in_backward:
                raise torch.OutOfMemoryError("injected")
            output[0].register_hook(fail)

    hook = register_module_forward_hook(forward)
    try:
        yield passes
    finally:
        hook.remove()


def probe(packs: int) -> int:
    return probe_microbatch(
        CONFIG, packs=packs, pack_tokens=16, pieces_per_pack=3, precision=Precision.FP32, device=CPU, mesh=None
    )


def test_all_packs_are_one_microbatch_where_they_fit() -> None:
    with memory_for(tokens=1000) as passes:
        assert probe(6) == 6
    assert passes == [96]  # no second microbatch, whose pass would have gradients beside it


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(("tokens", "found"), [(16 * 12, 12), (16 * 12 - 1, 6), (16 * 6, 6), (50, 3), (16, 1)])
def test_the_microbatch_is_halved_until_it_fits(tokens: int, found: int, in_backward: bool) -> None:
    with memory_for(tokens, in_backward=in_backward) as passes:
        assert probe(12) == found
    assert passes[-1] == 16 * found


def test_accumulation_is_tried_with_gradients_in_memory() -> None:
    with memory_for(tokens=50) as passes:
        probe(12)
    assert passes == [48, 48]  # 12 and 6 packs failed in their first block


def test_a_pack_that_does_not_fit_stops_the_run_and_says_what_to_do() -> None:
    with memory_for(tokens=15), pytest.raises(MicrobatchError, match="not even one pack of 16 tokens fits") as caught:
        probe(12)
    assert "model.activation_checkpointing=true" in str(caught.value)


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def broken(packs: int) -> None:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        largest_that_fits(4, trial=broken, device=CPU)


def test_cublas_running_out_is_a_lack_of_memory() -> None:
    def trial(packs: int) -> None:
        if packs > 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    assert largest_that_fits(4, trial=trial, device=CPU) == 1


def test_the_probe_uses_no_random_numbers() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with memory_for(tokens=50):
        probe(12)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_batch_of_the_probe_is_full() -> None:
    batch = full_batch(packs=2, pack_tokens=10, pieces_per_pack=3, device=CPU)
    assert batch["tokens"].shape == batch["targets"].shape == (1, 20)
    assert batch["cu_seqlens"].tolist() == [0, 3, 7, 10, 13, 17, 20]
    assert batch["pack_starts"].tolist() == [0, 10, 20]
    assert batch["num_targets"] == 20


def record(pieces: int, packs: int) -> StreamRecord:
    return StreamRecord(
        split="train", source="web", lower=1, upper=16, documents=1, pieces=pieces, targets=1, bytes=1, packs=packs,
        index_sha256="",
        shards=[
            ShardRecord(basename="shard.00000.mds.zstd", bytes=1, sha256="", raw_bytes=1, raw_sha256="", packs=packs)
        ],
    )  # fmt: skip


def test_the_probe_has_twice_the_documents_of_the_densest_stream() -> None:
    assert densest_pack([record(30, 10), record(35, 10)], pack_tokens=64) == 7
    assert densest_pack([record(600, 10)], pack_tokens=64) == 64


def test_a_resumed_run_uses_the_microbatch_that_the_first_start_found(tmp_path: Path) -> None:
    tried: list[str] = []

    def start(device: str, found: int) -> int:
        def probe() -> int:
            tried.append(device)
            return found

        return remembered_microbatch(tmp_path, {"device": device}, probe)

    assert [start("H100", 4), start("H100", 8), start("A100", 2), start("A100", 1)] == [4, 4, 2, 2]
    assert tried == ["H100", "A100"]


@pytest.mark.parametrize(("given", "found"), [("auto", 8), (None, 8), (2, 2)])
def test_on_the_cpu_auto_is_the_default(given: object, found: int) -> None:
    prepared = SimpleNamespace(
        config=SimpleNamespace(microbatch_packs=given),
        plan=SimpleNamespace(batch_packs=8),
        shard_set=SimpleNamespace(manifest=None),
    )
    assert choose_microbatch(prepared, precision="fp32", device=DeviceCPU(), mesh=None) == found  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_agree_on_a_microbatch(programs: ForkServer) -> None:
    """Sharded by FSDP2; 8 packs of 16 tokens run out on both ranks in mid-forward, 4 fit."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
        "--nproc-per-node=2", Path(__file__).with_name("probe_worker.py"), "64",
    ]  # fmt: skip
    done = programs.run(list(map(str, command)), timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1] == "4 [128, 64, 64] 3"
