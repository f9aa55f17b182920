"""Devices and tokenizers, as the inference commands select them."""

from __future__ import annotations

from pathlib import Path

import torch

from streaming_rwkv.config import UserError
from streaming_rwkv.tokenizer import WORLD_VOCABULARY, Tokenizer, load_tokenizer


class DeviceError(UserError):
    """A device that this machine does not have or cannot use."""


def find_device(name: str | None) -> torch.device:
    """Return the device that `--device` names, by default a GPU if there is one.

    Raises:
        DeviceError: it cannot be used on this machine.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cuda" if name == "gpu" else name)  # a run's settings call it gpu
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"expected cpu or cuda, found {device.type}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion: a torch without CUDA
        reason = str(error).strip().partition("\n")[0]
        raise DeviceError(f"--device {name}: cannot be used here ({reason}); use cpu") from None
    return device


def find_tokenizer(checkpoint: Path) -> Tokenizer | None:
    """Return a checkpoint's tokenizer, or None if it has none.

    It is looked for in the checkpoint's folder, and in `tokenizer/` there and up to two folders above.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    candidates = [folder, *(place / "tokenizer" for place in (folder, *folder.resolve().parents[:2]))]
    names = ("tokenizer.json", "tokenizer.model", WORLD_VOCABULARY)
    for candidate in candidates:
        if any((candidate / name).is_file() for name in names):
            return load_tokenizer(candidate)
    return None
