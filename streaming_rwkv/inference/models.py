"""Models of checkpoints, wherever these are."""

from __future__ import annotations

from pathlib import Path

import torch

from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.weights import read_model
from streaming_rwkv.train.checkpoints.restore import local_checkpoint


def load_model(
    location: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> RWKV7:
    """Return the model of a checkpoint. No code in its files is run.

        model = load_model("runs/mine")
        logits = model(torch.tensor([[0, 17, 4]]))      # (1, 3, vocabulary)

    Args:
        location: a training run, for its newest complete checkpoint, or one of its checkpoints, each also on s3://; a
            Hugging Face folder of an RWKV-7 model; a `.pth`, `.pt`, `.safetensors` or `.st` with BlinkDL's names.
        dtype: of the parameters; bfloat16 halves the memory.
    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one that is not of an RWKV-7 model.
        StorageError: the object storage cannot be read.
    """
    with local_checkpoint(location) as path:
        return read_model(path, dtype=dtype).to(device)
