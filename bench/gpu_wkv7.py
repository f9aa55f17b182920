"""WKV-7 on a GPU: first whether it is right at full size, then how fast, against bytes and against public kernels.

    python bench/gpu_wkv7.py               a few minutes; a table, and bench/results/{date}-wkv7-{device}.json
    python bench/gpu_wkv7.py --rehearse    the whole script on the CPU, small: to try it, its figures mean nothing
    python bench/gpu_wkv7.py --only-time   after a run that passed the checks; {date}-wkv7-time-{device}.json

32,768 tokens of 64 heads in bfloat16, as 8 rows of 4096, as one document, as packs of short documents, and as
documents of all lengths: in chunks on tensor cores (ours), and by the sequential kernel that serves float32 (ours, step
by step). The floor is the time to read the inputs and write the outputs once, at the rate at which this GPU copies
memory: 14 bytes per channel and token forward, 26 more backward. Every row is written as soon as it is measured. Public
kernels are timed where they are installed and agree with ours:

    pip install flash-linear-attention          (fla)
    pip install --pre flashrwkv2                (needs torch 2.11, a CUDA toolkit and ninja)
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import importlib.metadata
import itertools
import json
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streaming_rwkv.ops import cuda, wkv7
from streaming_rwkv.ops.testing import Case, errors, make_case, run, run_reference

# Tokens per document, by deciles, of 1,708 documents of web pages, textbooks, code and forums in English and Chinese
# (RWKV World's vocabulary; the last one is the 99th percentile). Training cuts them at 2048.
DECILES = (17, 53, 74, 107, 552, 956, 1415, 2080, 3231, 5358, 21897)
LONGEST_PIECE = 2048
BYTES_FORWARD, BYTES_BACKWARD = 14, 26  # six inputs, one output; six inputs, one gradient in, six out
BF16_BOUND = 2.5e-3  # ‖Δ‖ / ‖reference‖; rounding once gives 1.7e-3
AGREES = 2e-2  # what public kernels hold each other to, doubled

Op = Callable[..., Tensor]  # (six inputs, cu_seqlens) → y


class Row(NamedTuple):
    layout: str
    kernel: str
    forward_ms: float | None
    both_ms: float | None
    remark: str = ""


# --- layouts ---------------------------------------------------------------------------------------------------------


def natural_lengths(tokens: int, seed: int = 0) -> list[int]:
    """Return lengths of pieces of documents of all lengths, cut at LONGEST_PIECE, `tokens` in all."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (room := tokens - sum(lengths)) > 0:
        decile, within = divmod(torch.rand(1, generator=generator).item() * (len(DECILES) - 1), 1)
        low, high = DECILES[int(decile) : int(decile) + 2]
        document = min(round(low + (high - low) * within), room)
        lengths += [LONGEST_PIECE] * (document // LONGEST_PIECE) + [document % LONGEST_PIECE] * (
            document % LONGEST_PIECE > 0
        )
    return lengths


def layouts(rows: int, length: int) -> dict[str, list[int]]:
    tokens = rows * length
    packs = {f"documents of {size}": [size] * (tokens // size) for size in (256, 512, 1024, 2048) if size <= tokens}
    return {f"{rows} × {length}": [length] * rows, **packs, "documents as they come": natural_lengths(tokens)}


# --- kernels ---------------------------------------------------------------------------------------------------------


def ours(*inputs: Tensor, cu_seqlens: Tensor) -> Tensor:
    return wkv7(*inputs, cu_seqlens=cu_seqlens)[0]


class StepByStep(torch.autograd.Function):
    """The sequential kernel, which serves float32, for bfloat16."""

    @staticmethod
    def forward(ctx: Any, cu_seqlens: Tensor, *inputs: Tensor) -> Tensor:
        y, *saved = cuda.forward(inputs, None, cu_seqlens, save=any(x.requires_grad for x in inputs))
        ctx.save_for_backward(cu_seqlens, *inputs, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cu_seqlens, *tensors = ctx.saved_tensors
        *gradients, _ = cuda.backward(
            tuple(tensors[:6]), cu_seqlens, tuple(tensors[6:]), dy.contiguous(), None, initial_state=False
        )
        return None, *gradients


def step_by_step(*inputs: Tensor, cu_seqlens: Tensor) -> Tensor:
    y: Tensor = StepByStep.apply(cu_seqlens, *inputs)
    return y


def fla(*inputs: Tensor, cu_seqlens: Tensor) -> Tensor:
    chunk_rwkv7 = importlib.import_module("fla.ops.rwkv7").chunk_rwkv7
    r, w, k, v, a, b = inputs
    # As its own layer calls it: with a lower bound of log_decay it uses chunks of 64 on the tensor cores, else of 16.
    y: Tensor = chunk_rwkv7(
        r=r, w=w, k=k, v=v, a=a, b=b, scale=1.0, cu_seqlens=cu_seqlens.long(),
        safe_gate=True, lower_bound=-math.exp(-0.5), chunk_size=64,
    )[0]  # fmt: skip
    return y


def flashrwkv2(*inputs: Tensor, cu_seqlens: Tensor) -> Tensor:
    package = importlib.import_module("flashrwkv2")
    r, log_decay, k, v, a, b = (x[0] for x in inputs)
    logits = torch.logit((-math.exp(0.5) * log_decay.float()).clamp(1e-6, 1 - 1e-6)).to(r.dtype)
    documents, heads, size = cu_seqlens.shape[0] - 1, r.shape[1], r.shape[2]
    metadata = package.prepare_tmix_wkv7_statetune_metadata(
        torch.arange(documents + 1, dtype=torch.int32, device=r.device),
        cu_seqlens[:-1].contiguous(), cu_seqlens[1:].contiguous(), total_tokens=r.shape[0],
    )  # fmt: skip
    y, _ = package.statetune_tmix_wkv7_recurrent_fp32io16(
        r.new_zeros(documents, heads, size, size, dtype=torch.float32),
        None, None, None, r.contiguous(), logits, *(x.contiguous() for x in (k, v, a, b)), prepared_metadata=metadata,
    )  # fmt: skip
    return y.unsqueeze(0)


OURS: dict[str, Op] = {"ours": ours, "ours, step by step": step_by_step}
PUBLIC: dict[str, Op] = {"fla chunk_rwkv7": fla, "FlashRWKV2 statetune": flashrwkv2}


# --- correctness -----------------------------------------------------------------------------------------------------


def document_of(case: Case, index: int) -> Case:
    start, stop = case.cu_seqlens[index : index + 2].tolist()
    return Case(
        inputs=[x[:, start:stop].contiguous() for x in case.inputs],
        initial_state=case.initial_state[index : index + 1].contiguous(),
        cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32, device=case.dy.device),
        dy=case.dy[:, start:stop].contiguous(),
        dfinal_state=case.dfinal_state[index : index + 1].contiguous(),
    )


def check(layout: str, lengths: list[int], heads: int, device: torch.device) -> dict[str, float]:
    """Return the largest error of each result over three documents of a pack; a wrong result ends the script."""
    case = make_case(lengths, heads=heads, dtype=torch.bfloat16, device=device)
    found, again = run(wkv7, case), run(wkv7, case)
    if different := [name for name in found if not torch.equal(found[name], again[name])]:
        sys.exit(f"{layout}: {different} differ from run to run; nothing is timed")
    worst: dict[str, float] = {}
    ends = [0, *itertools.accumulate(lengths)]
    for index in sorted({0, len(lengths) // 2, len(lengths) - 1}):
        document = document_of(case, index)
        inside = {
            name: x[index : index + 1] if "state" in name else x[:, ends[index] : ends[index + 1]]
            for name, x in found.items()
        }
        alone = run(wkv7, document)
        if different := [name for name in alone if not torch.equal(alone[name], inside[name])]:
            sys.exit(f"{layout}: {different} of document {index} differ from the document alone; nothing is timed")
        for name, error in errors(inside, run_reference(document)).items():
            worst[name] = max(worst.get(name, 0.0), error)
    if wrong := {name: error for name, error in worst.items() if not error <= BF16_BOUND}:
        sys.exit(f"{layout}: wrong by {wrong}, allowed is {BF16_BOUND}; nothing is timed")
    return worst


# --- time ------------------------------------------------------------------------------------------------------------


def milliseconds(work: Callable[[], Any], device: torch.device, *, rounds: int) -> float:
    """Return the median of `rounds` runs, after two that do not count."""
    times = []
    for n in range(rounds + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize(device)
            elapsed = begin.elapsed_time(end)
        else:
            started = time.perf_counter()
            work()
            elapsed = (time.perf_counter() - started) * 1e3
        if n >= 2:
            times.append(elapsed)
    return statistics.median(times)


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a large copy."""
    source = torch.empty(1 << (30 if device.type == "cuda" else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source), device, rounds=10) * 1e-3)


def forward_only(op: Op, case: Case) -> None:
    with torch.no_grad():
        op(*case.inputs, cu_seqlens=case.cu_seqlens)


def forward_and_backward(op: Op, case: Case) -> None:
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    torch.autograd.grad(op(*leaves, cu_seqlens=case.cu_seqlens), leaves, case.dy)


def measure(layout: str, name: str, op: Op, case: Case, expected: Tensor, *, rounds: int) -> Row:
    device = case.dy.device
    try:
        y = op(*case.inputs, cu_seqlens=case.cu_seqlens)
        difference = errors({"y": y}, {"y": expected})["y"]
        if not difference <= AGREES:
            return Row(layout, name, None, None, f"differs from ours by {difference:.1e}")
        return Row(
            layout,
            name,
            milliseconds(functools.partial(forward_only, op, case), device, rounds=rounds),
            milliseconds(functools.partial(forward_and_backward, op, case), device, rounds=rounds),
        )
    except Exception as error:
        if op in OURS.values():
            raise
        # Other people's kernels fail in other people's ways; the table says how.
        return Row(
            layout, name, None, None, f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        )


def versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("cuda-core", "cuda-bindings", "triton", "flash-linear-attention", "flashrwkv2"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = str(properties.multi_processor_count)
    else:
        found["device"] = f"CPU rehearsal ({platform.machine()})"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="WKV-7 on a GPU: correctness at full size, then speed")
    parser.add_argument("--rehearse", action="store_true", help="small and on the CPU; the figures mean nothing")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only-time", action="store_true", help="skip the checks; for kernels that just passed them")
    add_results_option(parser)
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("no CUDA device here; on a machine with one, run this again, or try the script with --rehearse")
    folder = results_folder(options)
    device = torch.device("cpu" if options.rehearse else "cuda")
    rows, length, heads = (2, 256, 2) if options.rehearse else (8, 4096, 64)

    about = versions(device)
    print("  ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    started = time.perf_counter()
    run(wkv7, make_case([1], dtype=torch.bfloat16, device=device))
    print(f"first call, kernels compiled or read from the cache: {time.perf_counter() - started:.1f} s", flush=True)

    worst: dict[str, dict[str, float]] = {}
    for layout, lengths in () if options.only_time else layouts(rows, length).items():
        worst[layout] = check(layout, lengths, heads, device)
        print(f"right: {layout}: error {max(worst[layout].values()):.1e}, bitwise as alone and as again", flush=True)

    rate = copy_rate(device)
    floor = {
        "forward": rows * length * heads * 64 * BYTES_FORWARD / rate * 1e3,
        "both": rows * length * heads * 64 * (BYTES_FORWARD + BYTES_BACKWARD) / rate * 1e3,
    }
    print(f"\nmemory copies at {rate / 1e12:.2f} TB/s")
    print(f"floor {floor['forward']:.2f} ms forward, {floor['both']:.2f} ms with backward\n")
    print(f"{'layout':26}{'kernel':24}{'forward':>12}{'and backward':>14}{'× floor':>10}")
    record = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": about,
        "size": {"tokens": rows * length, "heads": heads, "dtype": "bfloat16"},
        "errors": worst,
        "copy_bytes_per_second": rate,
        "floor_ms": floor,
        "rows": [],
    }
    # One long document as well: few blocks, and too long for the reference to check.
    timed = layouts(rows, length) | {f"1 × {rows * length}": [rows * length]}
    # Ours first: others' kernels take minutes to compile, and may be stopped there.
    for name, op in {**({"ours": ours} if options.rehearse else OURS), **PUBLIC}.items():
        for layout, lengths in timed.items():
            case = make_case(lengths, heads=heads, dtype=torch.bfloat16, device=device)
            expected = ours(*case.inputs, cu_seqlens=case.cu_seqlens)
            row = measure(layout, name, op, case, expected, rounds=options.rounds)
            record["rows"].append(row._asdict())
            if row.forward_ms is None or row.both_ms is None:
                print(f"{layout:26}{name:24}    {row.remark}", flush=True)
            else:
                print(
                    f"{layout:26}{name:24}{row.forward_ms:9.2f} ms{row.both_ms:11.2f} ms"
                    f"{row.both_ms / floor['both']:9.1f}×",
                    flush=True,
                )
            if folder is not None:
                path = write(folder, "wkv7-time" if options.only_time else "wkv7", record)
    if folder is not None:
        print(f"\n{path}")
    if options.rehearse:
        print("\na rehearsal: its figures mean nothing")


# --- results ---------------------------------------------------------------------------------------------------------


def add_results_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results", type=Path, help="folder for the JSON file (default: bench/results; --rehearse: none)"
    )


def results_folder(options: argparse.Namespace) -> Path | None:
    """Return where results are written; None for a rehearsal that names no folder."""
    if options.results is not None or options.rehearse:
        return options.results
    return Path(__file__).with_name("results")


def write(folder: Path, what: str, record: dict[str, Any]) -> Path:
    """Write `record` to {date}-{what}-{device}.json by a rename, so that a reader or a kill never meets half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub("[^A-Za-z0-9]+", "-", record["versions"]["device"]).strip("-")
    path = folder / f"{record['time'][:10]}-{what}-{device}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    return partial.replace(path)


if __name__ == "__main__":
    main()
