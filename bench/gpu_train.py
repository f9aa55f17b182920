"""Training on a GPU, as a user runs it: killed, resumed, and timed.

    python bench/gpu_train.py               the 0.1B and 0.4B presets; about five minutes on one GPU, and
                                            bench/results/{date}-train-{device}.json, rewritten after each preset
    python bench/gpu_train.py --sizes 0.1B  one of them
    python bench/gpu_train.py --rehearse    the whole script on the CPU, small: to try it, its figures mean nothing

For each preset, on packs of generated tokens in pieces as long as those of real documents:

    run        `composer train.py`, FSDP2 over all GPUs here and bf16, killed with SIGKILL after its first checkpoint
               and started again; tokens/s is the median of its log's windows, without the first after each start
    MFU        of the dense bf16 peak, by the two conventions: matrices and recurrence, and 6 · parameters
    op         one microbatch, forward and backward, on one GPU: the time of the WKV-7 op of all layers within it
    fla        the same microbatch through flash-linear-attention's RWKV-7 of the same shape, where it is installed:
               pip install flash-linear-attention

Where there is no GPU nothing is measured, and the script says so.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_wkv7 import (
    LONGEST_PIECE,
    add_results_option,
    milliseconds,
    natural_lengths,
    results_folder,
    versions,
    write,
)
from streaming import MDSWriter

from streaming_rwkv.mds import read_index
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.flops import PEAK_FLOPS, flops_per_token, flops_per_token_6n, parameter_count
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.ops import wkv7
from streaming_rwkv.shards import (
    FORMAT,
    INDEX_NAME,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    StreamRecord,
    columns,
    offsets_of,
    stream_path,
)
from streaming_rwkv.tokenizer import load_tokenizer
from tests.source_counts import counts_of

ROOT = Path(__file__).parents[1]
EDGES = range(256, LONGEST_PIECE + 1, 256)
SIZES = {"0.1B": 2, "0.4B": 1}  # packs of a microbatch: about 24 and 36 GB, as preview.py estimates them


@dataclass(frozen=True, kw_only=True)
class Size:
    """The model that is trained, and the number of tokens."""

    name: str
    model: RWKV7Config
    settings: list[str]
    pack_tokens: int
    microbatch_packs: int
    batch_packs: int  # on each GPU
    steps: int
    checkpoint_steps: int  # killed soon after the first


def sizes(*, rehearse: bool, vocab_size: int) -> list[Size]:
    if rehearse:
        shape = {"hidden_size": 64, "num_layers": 2}
        model = RWKV7Config(vocab_size=vocab_size, **shape)
        settings = [f"model.{name}={value}" for name, value in shape.items()]
        return [
            Size(name="rehearsal", model=model, settings=settings, pack_tokens=2048, microbatch_packs=1,
                 batch_packs=1, steps=6, checkpoint_steps=2)
        ]  # fmt: skip
    return [
        Size(name=name, model=RWKV7Config(vocab_size=vocab_size, preset=name), settings=[f"model.preset={name}"],
             pack_tokens=8192, microbatch_packs=packs, batch_packs=8 * packs, steps=24, checkpoint_steps=8)
        for name, packs in SIZES.items()
    ]  # fmt: skip


# --- data ------------------------------------------------------------------------------------------------------------


def write_data_set(folder: Path, *, packs: int, pack_tokens: int) -> Path:
    """Write about `packs` packs of random tokens, by buckets of 256, in the shares that real documents have."""
    tokenizer = load_tokenizer("rwkv-world")
    tokenizer.save(folder / TOKENIZER_FOLDER)
    rng = np.random.default_rng(0)
    by_edge: dict[int, list[int]] = {edge: [] for edge in EDGES}
    for length in natural_lengths(packs * pack_tokens):
        by_edge[next(edge for edge in EDGES if length <= edge)].append(length)
    records = []
    for edge, lengths in by_edge.items():
        filled: list[list[int]] = [[]]
        for length in lengths:
            if sum(filled[-1]) + length > pack_tokens:
                filled.append([])
            filled[-1].append(length)
        if not lengths:
            continue
        path = folder / stream_path("train", "generated", f"{edge - 255}-{edge}")
        with MDSWriter(
            out=str(path), columns=columns(tokenizer.vocab_size), compression="zstd:1", hashes=["sha256"]
        ) as writer:
            for pack in filled:
                inputs = np.array(pack)
                tokens = rng.integers(1, tokenizer.vocab_size, inputs.sum() + len(pack)).astype(np.uint16)
                tokens[offsets_of(inputs + 1)[:-1]] = tokenizer.bos_id
                writer.write(
                    {
                        "tokens": tokens,
                        "lengths": (inputs + 1).astype(np.uint32),
                        "starts": np.zeros(len(pack), np.uint32),
                        "bytes": (4 * inputs).astype(np.uint32),
                        "keys": rng.integers(0, 1 << 62, len(pack)).astype(np.uint64),
                    }
                )
        index = (path / INDEX_NAME).read_bytes()
        shards = read_index(index, vocab_size=tokenizer.vocab_size, where=str(path))
        records.append(
            StreamRecord(
                split="train", source="generated", lower=edge - 255, upper=edge, documents=len(lengths),
                pieces=len(lengths), targets=sum(lengths), bytes=4 * sum(lengths), packs=len(filled),
                index_sha256=hashlib.sha256(index).hexdigest(), shards=shards,
            )
        )  # fmt: skip
    manifest = Manifest(
        format=FORMAT, pack_tokens=pack_tokens, edges=list(EDGES), tokenizer=tokenizer.record(), config={},
        counts=counts_of(records), streams=records,
    )  # fmt: skip
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return folder


# --- the run ---------------------------------------------------------------------------------------------------------


def train(size: Size, data: Path, save_folder: Path, *, processes: int, device: str) -> list[dict[str, Any]]:
    """Start, kill after the first checkpoint, and start again; return the lines of metrics of both, in order."""
    batch_packs = size.batch_packs * processes
    mean_fill = 0.95  # of first-fit packs; the number of steps need not be exact
    command = [
        sys.executable, "-m", "composer.cli", "-n", str(processes), "train.py", "yamls/tiny_cpu.yaml",
        f"data.path={data}", f"save_folder={save_folder}", f"data.batch_packs={batch_packs}",
        f"data.stages=[{{tokens: {round(size.steps * batch_packs * size.pack_tokens * mean_fill)}}}]",
        "data.max_repeats=1000", "model.hidden_size=null", "model.num_layers=null", *size.settings,
        f"microbatch_packs={size.microbatch_packs}", f"checkpoint.interval_steps={size.checkpoint_steps}",
        "log.interval_steps=2", "log.tensorboard=false", f"device={device}",
    ]  # fmt: skip
    log = save_folder.with_suffix(".log")
    with open(log, "ab") as output:
        first = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        while first.poll() is None and len(metrics_of(save_folder)) < size.checkpoint_steps + 2:
            time.sleep(0.2)
        if first.returncode is not None:
            sys.exit(f"{size.name}: ended with {first.returncode} before it was killed:\n{log.read_text()[-3000:]}")
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        before = [line for line in metrics_of(save_folder) if line["step"] <= size.checkpoint_steps]
        status = subprocess.call(command, cwd=ROOT, stdout=output, stderr=output)
    if status or "resuming from" not in log.read_text():
        sys.exit(f"{size.name}: the second start ended with {status}:\n{log.read_text()[-3000:]}")
    lines = metrics_of(save_folder)
    if lines[: len(before)] != before or [line["step"] for line in lines] != list(range(1, lines[-1]["step"] + 1)):
        sys.exit(
            f"{size.name}: the resumed run does not continue from step {size.checkpoint_steps}; nothing is reported"
        )
    return lines


def metrics_of(save_folder: Path) -> list[dict[str, Any]]:
    path = save_folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def tokens_per_second(lines: list[dict[str, Any]], *, resumed_at: int) -> float:
    """Return the median over windows, without the first after each start, in which kernels are compiled."""
    rates = {
        line["step"]: line["throughput/tokens_per_second"] for line in lines if "throughput/tokens_per_second" in line
    }
    return statistics.median(rate for step, rate in rates.items() if step not in (2, resumed_at + 2))


# --- one microbatch --------------------------------------------------------------------------------------------------


def microbatch(size: Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens (1, T), targets (1, T) and cu_seqlens of documents of all lengths."""
    lengths = natural_lengths(size.microbatch_packs * size.pack_tokens, seed=1)
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(1, size.model.vocab_size, (1, sum(lengths) + 1), generator=generator, device=device)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    return tokens[:, :-1], tokens[:, 1:], cu_seqlens


def autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def model_ms(size: Size, device: torch.device, *, rounds: int) -> float:
    model = RWKV7(size.model)
    initialize(model, seed=0)
    model.to(device)
    tokens, targets, cu_seqlens = microbatch(size, device)

    def work() -> None:
        model.zero_grad()
        with autocast(device):
            # A sum, as in training: of a mean's gradient the head does not know that it is one number.
            loss = model(tokens, cu_seqlens=cu_seqlens, targets=targets).sum() / targets.numel()
        loss.backward()

    return milliseconds(work, device, rounds=rounds)


def op_ms(size: Size, device: torch.device, *, rounds: int) -> float:
    """Time one layer's op, forward and backward, on inputs as in the model."""
    tokens, _, cu_seqlens = microbatch(size, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, tokens.shape[1], size.model.num_heads, size.model.head_size)
    r, w, k, v, a, gradient = (torch.randn(shape, generator=generator, device=device) for _ in range(6))
    direction = torch.nn.functional.normalize(k, dim=-1)
    inputs = [r, -0.6065 * torch.sigmoid(w), k, v, -direction, direction * torch.sigmoid(a)]
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    gradient = gradient.to(dtype)

    def work() -> None:
        torch.autograd.grad(wkv7(*leaves, cu_seqlens=cu_seqlens)[0], leaves, gradient)

    return milliseconds(work, device, rounds=rounds)


def fla_ms(size: Size, device: torch.device, *, rounds: int) -> float:
    """Time flash-linear-attention's model of the same shape on the same documents."""
    module = importlib.import_module("fla.models.rwkv7")
    config = size.model
    theirs = module.RWKV7Config(
        hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, head_dim=config.head_size,
        intermediate_size=config.ffn_size, vocab_size=config.vocab_size, decay_low_rank_dim=config.decay_rank,
        a_low_rank_dim=config.a_rank, v_low_rank_dim=config.v_rank, gate_low_rank_dim=config.gate_rank,
        use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    model = module.RWKV7ForCausalLM(theirs).to(device)
    tokens, targets, cu_seqlens = microbatch(size, device)

    def work() -> None:
        model.zero_grad()
        with autocast(device):
            loss = model(input_ids=tokens, labels=targets, cu_seqlens=cu_seqlens.long()).loss
        loss.backward()

    return milliseconds(work, device, rounds=rounds)


def attempt(measure: Callable[[], float]) -> tuple[float | None, str]:
    """Return the figure, or the reason that there is none: other projects' models fail in their own ways."""
    try:
        return measure(), ""
    except ImportError as error:
        return None, f"not installed ({error})"
    except Exception as error:  # noqa: BLE001
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


# --- all of it -------------------------------------------------------------------------------------------------------


def measure(size: Size, work: Path, *, rehearse: bool, rounds: int) -> dict[str, Any]:
    device = torch.device("cpu" if rehearse else "cuda")
    processes = 1 if rehearse else torch.cuda.device_count()
    data = write_data_set(work / f"data-{size.name}", packs=8 if rehearse else 512, pack_tokens=size.pack_tokens)
    lines = train(size, data, work / size.name, processes=processes, device="cpu" if rehearse else "gpu")
    rate = tokens_per_second(lines, resumed_at=size.checkpoint_steps)
    name = "" if rehearse else torch.cuda.get_device_name()
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    whole, op = model_ms(size, device, rounds=rounds), op_ms(size, device, rounds=rounds) * size.model.num_layers
    fla, remark = attempt(functools.partial(fla_ms, size, device, rounds=rounds))
    tokens = size.microbatch_packs * size.pack_tokens
    return {
        "size": size.name,
        "parameters": parameter_count(size.model),
        "processes": processes,
        "batch_packs": size.batch_packs * processes,
        "microbatch_packs": size.microbatch_packs,
        "pack_tokens": size.pack_tokens,
        "steps": lines[-1]["step"],
        "killed_after_checkpoint_of_step": size.checkpoint_steps,
        "tokens_per_second": rate,
        "mfu": peak and rate * flops_per_token(size.model) / (peak * processes),
        "mfu_6n": peak and rate * flops_per_token_6n(size.model) / (peak * processes),
        "microbatch_ms": whole,
        "microbatch_tokens_per_second": tokens / whole * 1e3,
        "op_ms": op,
        "op_share": op / whole,
        "fla_microbatch_ms": fla,
        "fla_remark": remark,
    }


def show(row: dict[str, Any]) -> None:
    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    print(f"\n{row['size']}: {row['parameters']:,} parameters, {row['processes']} process(es)")
    print(f"  run      killed after step {row['killed_after_checkpoint_of_step']}, resumed, {row['steps']} steps")
    print(f"           {row['tokens_per_second']:,.0f} tokens/s, MFU {share(row['mfu'])}, by 6N {share(row['mfu_6n'])}")
    print(f"  model    {row['microbatch_ms']:.1f} ms a microbatch, {row['microbatch_tokens_per_second']:,.0f} tokens/s")
    print(f"  op       {row['op_ms']:.1f} ms of it, {share(row['op_share'])}")
    if row["fla_microbatch_ms"]:
        ratio = row["fla_microbatch_ms"] / row["microbatch_ms"]
        print(f"  fla      {row['fla_microbatch_ms']:.1f} ms: {ratio:.2f}× ours", flush=True)
    else:
        print(f"  fla      {row['fla_remark']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Training on a GPU: tokens/s and MFU, through a kill and a resume")
    parser.add_argument("--rehearse", action="store_true", help="small and on the CPU; the figures mean nothing")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="presets (default: both)")
    add_results_option(parser)
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit(
            "no CUDA device here: nothing was measured; on a machine with one, run this again, or try the script "
            "with --rehearse"
        )
    about = versions(torch.device("cpu" if options.rehearse else "cuda"))
    print("  ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    rounds = 1 if options.rehearse else options.rounds
    record: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": about,
        "rows": [],
    }
    folder = results_folder(options)
    failed = []
    with tempfile.TemporaryDirectory() as work:
        for size in sizes(rehearse=options.rehearse, vocab_size=load_tokenizer("rwkv-world").vocab_size):
            if not options.rehearse and size.name not in options.sizes:
                continue
            try:
                row = measure(size, Path(work), rehearse=options.rehearse, rounds=rounds)
                show(row)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # GPU time is short: the next size is still measured
                traceback.print_exc()
                row = {"size": size.name, "failed": f"{type(error).__name__}: {error}"}
                failed.append(size.name)
            record["rows"].append(row)
            if folder is not None:
                print(f"  written  {write(folder, 'train', record)}", flush=True)
    if options.rehearse:
        print("\na rehearsal: its figures mean nothing")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
