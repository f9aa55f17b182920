"""Average of a run's newest checkpoints: `streaming-rwkv average RUN --last 8 OUT`.

Weights are read, added in float64 and rounded one tensor at a time, so memory holds one model whatever the number of
checkpoints. Averaging checkpoints of a constant learning rate has the effect of a decay of the rate.

Source: WSM, arXiv 2507.17634: the share of the update between two checkpoints that remains in the average is the sum of
the weights of all later checkpoints.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from streaming_rwkv.console import shown, shown_bytes
from streaming_rwkv.inference.export import (
    DTYPES,
    check_out,
    export_bytes,
    how_to_load,
    local_out,
    write_export,
)
from streaming_rwkv.inference.loading import find_tokenizer
from streaming_rwkv.model.marked_files import CheckpointError, unreadable
from streaming_rwkv.model.sharded import ShardedWeights
from streaming_rwkv.outputs import CHECKPOINTS
from streaming_rwkv.train.checkpoints.local import LocalCheckpoints
from streaming_rwkv.train.checkpoints.record import step_name
from streaming_rwkv.train.checkpoints.restore import local_run

A = TypeVar("A")
T = TypeVar("T")

Scheme = Literal["equal", "linear", "1-sqrt"]


def scheme_weights(scheme: Scheme, count: int) -> list[float]:
    """Return the weights of `count` checkpoints, from the oldest to the newest, adding up to 1.

    `equal` leaves of the updates what a linear decay of the learning rate leaves, `1-sqrt` what a decay by
    1 - √(progress) leaves; `linear` weights are in proportion to 1, 2, …, so that the newest weighs most.
    """
    match scheme:
        case "equal":
            return [1 / count] * count
        case "linear":
            return [2 * number / (count * (count + 1)) for number in range(1, count + 1)]
        case "1-sqrt":
            return [((number + 1) / count) ** 0.5 - (number / count) ** 0.5 for number in range(count)]


def average(
    folders: Sequence[Path], weights: Sequence[float], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the weighted average of checkpoints of one shape, each sum made in float64 and rounded once to `dtype`.

    Raises:
        CheckpointError: a checkpoint is damaged, or has other weights than the first.
    """
    sources = [_read(folder, ShardedWeights, folder) for folder in folders]
    shapes = sources[0].shapes
    for folder, source in zip(folders, sources, strict=True):
        if source.shapes != shapes:
            name = next(n for n in sorted({*shapes, *source.shapes}) if shapes.get(n) != source.shapes.get(n))
            raise CheckpointError(
                f"{folder}: {name} is {source.shapes.get(name, 'missing')}, in {folders[0]} it is "
                f"{shapes.get(name, 'missing')}; average checkpoints of one shape: give a smaller --last"
            )
    averaged = {}
    for name, shape in shapes.items():
        total = torch.zeros(shape, dtype=torch.float64)
        for source, weight in zip(sources, weights, strict=True):
            total += weight * _read(source.folder, source.read, name).double()
        averaged[name] = total.to(dtype)
    return averaged


def _read(folder: Path, read: Callable[[A], T], argument: A) -> T:
    """Call a reader, and turn its errors into ones that name the checkpoint."""
    try:
        return read(argument)
    except PermissionError as error:
        raise unreadable(folder, error) from None
    except (pickle.UnpicklingError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(f"{folder}: damaged ({error}); move it away, or copy it again from its source") from None


@contextmanager
def newest_checkpoints(run: str, count: int) -> Iterator[list[Path]]:
    """Yield the folders of a run's `count` newest checkpoints, oldest first; those in object storage are copied.

    Raises:
        CheckpointError: there are fewer, or one of them is damaged.
        StorageError: the store cannot be read, or sends damaged objects.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(local_run(run, last=count))
        place = LocalCheckpoints(folder / CHECKPOINTS)
        steps = sorted(place.steps())[-count:]
        if len(steps) < count:
            found = ", ".join(map(step_name, steps)) or "none"
            raise CheckpointError(
                f"{run}: --last {count}: the run has {len(steps)} checkpoints ({found}); give a smaller --last, and "
                "keep more of them by `checkpoint.keep` or `checkpoint.keep_every`"
            )
        for step in steps:
            try:
                place.find(step)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{run}: {step_name(step)} is damaged ({error}); move it away to average the others"
                ) from None
        yield [place.root / step_name(step) for step in steps]


def run(options: argparse.Namespace) -> int:
    """Write the average, say which checkpoints are in it, and return the exit status."""
    out = local_out(options.out)
    check_out(out, overwrite=options.overwrite)
    with newest_checkpoints(options.run, options.last) as folders:
        dtype = DTYPES[options.dtype]
        # float16's largest value is small: rounded when it is written, where what is too large is refused by name.
        rounded = torch.float32 if dtype == torch.float16 else dtype
        state = average(folders, scheme_weights(options.weights, len(folders)), dtype=rounded)
        tokenizer = find_tokenizer(folders[-1])
        write_export(state, out, dtype=dtype, tokenizer=tokenizer, overwrite=options.overwrite)
        names = ", ".join(folder.name for folder in folders)
        size = shown_bytes(export_bytes(out))
        print(f"wrote {shown(options.out)}: {size}, the average of {len(folders)} checkpoints, {names}")
        print(how_to_load(out))
    return 0
