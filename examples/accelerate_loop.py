"""Train a small RWKV-7 with Hugging Face Accelerate, on one process or many.

    pip install '.[examples]'
    torchrun --nproc-per-node 2 examples/accelerate_loop.py DATA_SET runs/accelerate

The data set divides each step among the processes itself, so it does not go through `accelerator.prepare`. Its state
is saved with the others, and may be loaded by another number of processes. It is saved as JSON: what is registered by
`accelerator.register_for_checkpointing` is loaded as a pickle, which may run any code.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":

    def stop(number: int, _: object) -> None:
        """End the program at Ctrl-C."""
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped; the same command continues from the newest state", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, stop)  # before the imports, which take long

import argparse
import json
import shutil
from pathlib import Path

import torch

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run pip install '.[examples]'")

from streaming_rwkv import RWKV7, RWKV7Config, StepDataset, UserError, initialize, open_dataset


def train(data: str, folder: Path, *, batch_packs: int = 2, save_every: int = 100, stop_at: int | None = None) -> float:
    """Train for one pass over the data, or up to a step; return the last step's loss in nats per token."""
    try:
        accelerator = Accelerator(cpu=not torch.cuda.is_available())  # it would not look for other processes on a CPU
    except (ValueError, RuntimeError) as error:  # of the variables that a launcher sets, and of what they lead to
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"Accelerate cannot start ({reason}); use torchrun, or unset WORLD_SIZE, RANK and LOCAL_RANK"
        ) from None
    loss = float("nan")
    with open_dataset(
        data,
        batch_packs=batch_packs,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        cache=folder / "cache",
    ) as dataset:
        shape = RWKV7Config(vocab_size=dataset.manifest.tokenizer.vocab_size, hidden_size=64, num_layers=2)
        network = RWKV7(shape)
        initialize(network, seed=17)
        model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
        state = max(folder.glob("state-*"), default=None)
        if state is not None:
            try:
                accelerator.load_state(str(state))
                dataset.load_state_dict(json.loads((state / "data.json").read_bytes()))
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 - damaged, or another program's
                problem = f"cannot be continued from ({type(error).__name__}); remove it to start again"
                raise UserError(f"{state}: {problem}") from None
        for batch in dataset:
            tokens, targets = batch["tokens"].to(accelerator.device), batch["targets"].to(accelerator.device)
            nll = model(tokens, cu_seqlens=batch["cu_seqlens"], targets=targets)
            # Gradients are averaged over processes, and the loss is the mean over all their targets.
            sums = accelerator.reduce(torch.stack([nll.detach().sum(), (targets >= 0).sum()]), "sum")
            optimizer.zero_grad()
            accelerator.backward(nll.sum() * accelerator.num_processes / sums[1])
            optimizer.step()
            loss = float(sums[0] / sums[1])
            step = dataset.step  # the number of batches so far
            is_last = step in (len(dataset), stop_at)
            if is_last or step % 10 == 0:
                accelerator.print(f"step {step}/{len(dataset)}  loss {loss:.4f}")
            if is_last or step % save_every == 0:
                save(accelerator, dataset, folder)
            if is_last:
                break
    accelerator.end_training()
    return loss


def save(accelerator: Accelerator, dataset: StepDataset, folder: Path) -> None:
    """Save all states as `folder/state-STEP` and remove those of earlier steps; a kill leaves the newest whole one."""
    new = folder / "new"
    if accelerator.is_main_process:
        new.unlink() if new.is_symlink() else shutil.rmtree(new, ignore_errors=True)  # of a program that was killed
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(new))
    except Exception as error:  # noqa: BLE001 - of any of the libraries that write a part of it
        reason = str(error).partition("\n")[0]
        raise UserError(f"{new}: cannot be written ({reason}); the state before is kept") from None
    if accelerator.is_main_process:
        (new / "data.json").write_text(json.dumps(dataset.state_dict()))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        earlier = list(folder.glob("state-*"))
        new.rename(folder / f"state-{dataset.step:08}")
        for state in earlier:
            shutil.rmtree(state)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", help="a folder, or s3://bucket/prefix")
    parser.add_argument("folder", type=Path, help="for the state and the cache of shards")
    parser.add_argument("--batch-packs", type=int, default=2, help="packs of a step (default: 2)")
    options = parser.parse_args()
    try:
        train(options.data, options.folder, batch_packs=options.batch_packs)
    except (UserError, OSError) as error:  # wrong data, arguments or folders
        sys.exit(f"error: {error}")
