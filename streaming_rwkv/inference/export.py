"""Export of weights for other programs: `python -m streaming_rwkv.export CHECKPOINT OUT`.

An OUT that ends with .pth is written in BlinkDL's format (`rwkv`, RWKV-Runner, his trainers); any other OUT is a
Hugging Face folder with the tokenizer (`fla`, `rwkv7_hf`).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from streaming_rwkv.config import UserError
from streaming_rwkv.console import shown
from streaming_rwkv.inference.loading import find_tokenizer
from streaming_rwkv.location import checked_local
from streaming_rwkv.model.weights import read_state, write_huggingface, write_pth
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from streaming_rwkv.train.checkpoints.restore import local_checkpoint

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export(checkpoint: Path, out: Path, *, dtype: torch.dtype, tokenizer: Tokenizer | None) -> None:
    """Write the weights of any checkpoint that `read_state` reads, and into a folder also the tokenizer.

    Raises:
        CheckpointError: it cannot be read, or the Hugging Face implementations do not support its head size.
    """
    state = read_state(checkpoint)
    if out.suffix == ".pth":
        write_pth(state, out, dtype=dtype)
        return
    if tokenizer is None:
        write_huggingface(state, out, dtype=dtype)
    else:
        tokenizer.save(out)
        if tokenizer.kind == "rwkv-world":
            _write_world_for_transformers(out)
        write_huggingface(state, out, dtype=dtype, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)


def _write_world_for_transformers(folder: Path) -> None:
    """Write the code with which `AutoTokenizer` reads RWKV World's vocabulary; tokenizer.json cannot hold it."""
    name = "tokenization_rwkv_world"
    shutil.copyfile(Path(__file__).parents[1] / f"{name}.py", folder / f"{name}.py")
    end = "<|endoftext|>"
    config = {
        "tokenizer_class": "RWKVWorldTokenizer",
        "auto_map": {"AutoTokenizer": [f"{name}.RWKVWorldTokenizer", None]},
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def run(options: argparse.Namespace) -> int:
    """Export a checkpoint, say where it is, and return the exit status."""
    out = _local_out(options.out)
    with local_checkpoint(options.checkpoint) as checkpoint:
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else find_tokenizer(checkpoint)
        export(checkpoint, out, dtype=DTYPES[options.dtype], tokenizer=tokenizer)
    without = "" if tokenizer or out.suffix == ".pth" else ", without a tokenizer: none is stored with it"
    print(f"wrote {shown(str(out))}{without}")
    return 0


def _local_out(name: str) -> Path:
    out = Path(checked_local(name, remedy="give a local path, and copy the export from there"))
    if out.suffix == ".pth" and out.is_dir():
        raise UserError(f"{out}: is a folder, but a .pth is one file; use another name")
    if out.suffix != ".pth" and out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name NAME.pth, or a folder")
    return out
