"""Train a small RWKV-7 in a plain PyTorch loop that continues where it was stopped.

    python examples/pytorch_loop.py DATA_SET runs/plain

DATA_SET is a folder or s3://bucket/prefix that `prep` has built. Run the same command again after a stop: the step is
all that has to be saved of the data, and no pack is repeated or left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

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
                torch.save(state, folder / "new.pt")
                os.replace(folder / "new.pt", checkpoint)  # a kill leaves the old one
            if is_last:
                break
    return loss


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
