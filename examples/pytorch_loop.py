"""Train a small RWKV-7 in a plain PyTorch loop that continues where it was stopped.

    python examples/pytorch_loop.py DATA_SET runs/plain

DATA_SET is a folder or s3://bucket/prefix that `prep` has built. Run the same command again after a stop: the step is
all that has to be saved of the data, and no pack is repeated or left out.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":

    def stop(number: int, _: object) -> None:
        """End the program at Ctrl-C."""
        print("\nstopped; the same command continues from the newest checkpoint", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, stop)  # before the imports, which take long

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from streaming_rwkv import RWKV7, RWKV7Config, StageConfig, UserError, initialize, open_dataset


def train(data: str, folder: Path, *, batch_packs: int = 2, save_every: int = 100, stop_at: int | None = None) -> float:
    """Train for one pass over the data, or up to a step; return the last batch's loss in nats per token."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, loss = folder / "checkpoint.pt", float("nan")
    with open_dataset(data, stages=[StageConfig(passes=1)], batch_packs=batch_packs, cache=folder / "cache") as dataset:
        shape = RWKV7Config(vocab_size=dataset.manifest.tokenizer.vocab_size, hidden_size=64, num_layers=2)
        model = RWKV7(shape)
        initialize(model, seed=17)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
        if checkpoint.is_file():
            try:
                saved = torch.load(checkpoint, weights_only=True)
                dataset.load_state_dict(saved["data"])  # first, as it refuses the state of another data set
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 - damaged, or another program's
                problem = f"cannot be continued from ({type(error).__name__}); remove it to start again"
                raise UserError(f"{checkpoint}: {problem}") from None
        for batch in dataset:
            nll = model(batch["tokens"], cu_seqlens=batch["cu_seqlens"], targets=batch["targets"])
            mean = nll.sum() / batch["num_targets"]
            optimizer.zero_grad()
            mean.backward()
            optimizer.step()
            loss = mean.item()
            step = dataset.step  # the number of batches so far
            is_last = step in (len(dataset), stop_at)
            if is_last or step % 10 == 0:
                print(f"step {step}/{len(dataset)}  loss {loss:.4f}")
            if is_last or step % save_every == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "data": dataset.state_dict()}
                save(state, checkpoint)
            if is_last:
                break
    return loss


def save(state: dict[str, Any], checkpoint: Path) -> None:
    """Replace the checkpoint; a kill or a full disk leaves the old one."""
    new = checkpoint.with_name("new.pt")
    new.unlink(missing_ok=True)  # of a program that was killed, or a link, whose file would be overwritten
    try:
        with new.open("xb") as file:
            torch.save(state, file)
        os.replace(new, checkpoint)
    except (OSError, RuntimeError) as error:  # torch raises the second while it handles the first
        reason = error if isinstance(error, OSError) else error.__context__
        raise UserError(f"{checkpoint}: cannot be written ({reason}); the one before is kept") from None
    finally:
        new.unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", help="a folder, or s3://bucket/prefix")
    parser.add_argument("folder", type=Path, help="for the checkpoint and the cache of shards")
    parser.add_argument("--batch-packs", type=int, default=2, help="packs of a step (default: 2)")
    options = parser.parse_args()
    try:
        train(options.data, options.folder, batch_packs=options.batch_packs)
    except (UserError, OSError) as error:  # wrong data, arguments or folders
        sys.exit(f"error: {error}")
