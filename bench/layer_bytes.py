"""Count the bytes that a layer moves outside matrix products and WKV-7, its launches, and what it saves for backward.

    python bench/layer_bytes.py [--hidden-size 256] [--tokens 4096]

Under bf16 autocast on a pack of two documents, as training on a GPU runs it; eager (every op's PyTorch definition) and
fused. A count is what a kernel reads and writes once, per channel and token: caches would lower, partial cache lines
raise it. Nothing is timed, so the device does not matter. Counts of one layer are those of three layers less those of
two.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.ops import definitions, launch

# Operators that launch nothing.
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "unsqueeze", "squeeze", "detach", "alias",
    "as_strided", "select", "reshape", "unflatten", "unbind", "split", "empty", "empty_like", "new_empty",
    "_reshape_alias", "lift_fresh", "empty_strided", "new_empty_strided", "is_same_size", "_local_scalar_dense",
    "view_as", "size", "stride",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "linear", "matmul"}


class Cost(NamedTuple):
    """Bytes per channel and token, and launches, by kind."""

    bytes: dict[str, float]
    launches: dict[str, int]

    def total(self) -> tuple[float, int]:
        """Return bytes and launches without matrix products and WKV-7."""
        kinds = [kind for kind in self.launches if kind not in ("matrix products", "wkv7")]
        return sum(self.bytes[kind] for kind in kinds), sum(self.launches[kind] for kind in kinds)


class LayerCost(NamedTuple):
    forward: Cost
    backward: Cost
    saved_bytes: float  # for the backward pass, per channel and token


class _Counter(TorchDispatchMode):
    """Counts torch's kernels, and ours where they are launched. Tensors smaller than `least` are parameters, whose
    bytes many tokens share."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.bytes: collections.Counter[str] = collections.Counter()
        self.launches: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if name in VIEWS or (namespace == "streaming_rwkv" and name not in ("wkv7", "wkv7_backward")):
            return out  # ours are counted by their launches
        kind = "matrix products" if name in PRODUCTS else "wkv7" if namespace == "streaming_rwkv" else name
        self._count(kind, [*tree_flatten((args, kwargs))[0], *tree_flatten(out)[0]])
        return out

    def launch(self, kernel: launch.Kernel, blocks: int, arguments: Sequence[launch.Argument]) -> None:
        launch.launch_cpp(kernel, blocks, arguments)
        self._count(kernel.name, arguments)

    def _count(self, kind: str, values: Sequence[Any]) -> None:
        self.launches[kind] += 1
        for x in values:
            if isinstance(x, Tensor):
                # A broadcast operand costs only what is stored.
                stored = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
                count = torch.Size(stored).numel()
                if count >= self.least:
                    self.bytes[kind] += count * x.element_size()


def layer_cost(*, fused: bool, hidden_size: int, tokens: int) -> LayerCost:
    """Measure the cost of one layer."""
    two, three = (_counts(fused, hidden_size, tokens, layers) for layers in (2, 3))
    unit = tokens * hidden_size

    def difference(index: int) -> Cost:
        (less_bytes, less_launches), (more_bytes, more_launches) = two[index], three[index]
        found = {kind: count - less_launches[kind] for kind, count in more_launches.items()}
        kinds = [kind for kind, count in found.items() if count]
        return Cost(
            {kind: (more_bytes[kind] - less_bytes[kind]) / unit for kind in kinds}, {k: found[k] for k in kinds}
        )

    return LayerCost(difference(0), difference(1), (three[2] - two[2]) / unit)


Counts = tuple[collections.Counter[str], collections.Counter[str]]


def _counts(fused: bool, hidden_size: int, tokens: int, layers: int) -> tuple[Counts, Counts, int]:
    network = RWKV7(RWKV7Config(hidden_size=hidden_size, num_layers=layers, vocab_size=64))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02, generator=generator)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved: dict[int, Tensor] = {}

    def save(x: Tensor) -> Tensor:
        # Weights that were cast are no activations: they are as large for any number of tokens.
        if x.untyped_storage().data_ptr() not in weights and x.numel() >= tokens:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    ids = torch.randint(64, (1, tokens), generator=generator)
    cu_seqlens = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    least = tokens * hidden_size // 8
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x), _counting(least, fused) as forward:
        nll = network(ids, cu_seqlens=cu_seqlens, targets=ids).sum()
    saved_bytes = sum(x.untyped_storage().nbytes() for x in saved.values())
    with _counting(least, fused) as backward:
        nll.backward()
    return (forward.bytes, forward.launches), (backward.bytes, backward.launches), saved_bytes


@contextlib.contextmanager
def _counting(least: int, fused: bool) -> Iterator[_Counter]:
    counter = _Counter(least)
    with (
        contextlib.nullcontext() if fused else definitions(),
        torch.autocast("cpu", torch.bfloat16),
        patch.object(launch, "launcher", lambda _: counter.launch),
        counter,
    ):
        yield counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    for fused in (False, True):
        cost = layer_cost(fused=fused, hidden_size=options.hidden_size, tokens=options.tokens)
        title = "fused" if fused else "eager"
        for direction, (moved, launches) in (("forward", cost.forward), ("backward", cost.backward)):
            print(f"\n{title}, {direction}: bytes per channel and token, launches")
            for kind in sorted(launches, key=lambda kind: -moved[kind]):
                print(f"    {kind:32} {moved[kind]:7.1f} {launches[kind]:5}")
        totals = [part.total() for part in (cost.forward, cost.backward)]
        for direction, (moved_total, launched) in zip(("forward", "backward"), totals, strict=True):
            print(
                f"{title}, {direction}, without matrix products and WKV-7: {moved_total:.0f} bytes, {launched} launches"
            )
        print(f"{title}: {sum(moved_total for moved_total, _ in totals):.0f} bytes in all")
        print(f"{title}: {cost.saved_bytes:.1f} bytes per channel and token saved for the backward pass")


if __name__ == "__main__":
    main()
