"""Export of weights for other programs: `python -m streaming_rwkv.export CHECKPOINT OUT`.

An OUT that ends with .pth is written in BlinkDL's format (`rwkv`, RWKV-Runner, his trainers); any other OUT is a
Hugging Face folder with the tokenizer (`fla`, `rwkv7_hf`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from streaming_rwkv.config import UserError
from streaming_rwkv.console import print_error, shown, shown_bytes, tolerate_any_encoding
from streaming_rwkv.filesystem import write_atomically
from streaming_rwkv.inference.loading import find_tokenizer
from streaming_rwkv.location import checked_local
from streaming_rwkv.model.flops import parameter_count
from streaming_rwkv.model.state import infer_config
from streaming_rwkv.model.weights import read_state, write_huggingface, write_pth
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from streaming_rwkv.train.checkpoints.restore import local_checkpoint

CARD_NAME = "README.md"
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
        generation = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "do_sample": True,
            "top_p": 0.9,
        }
        write_atomically(out / "generation_config.json", (json.dumps(generation, indent=1) + "\n").encode())
    write_atomically(out / CARD_NAME, model_card(state, dtype=dtype, tokenizer=tokenizer).encode())


def model_card(state: Mapping[str, torch.Tensor], *, dtype: torch.dtype, tokenizer: Tokenizer | None) -> str:
    """Return the README.md of an exported folder: what the model is and how it is loaded."""
    config = infer_config(state, where="export")
    trusts = ", trust_remote_code=True" if tokenizer is not None and tokenizer.kind == "rwkv-world" else ""
    loads_tokenizer = f"""
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("."{trusts})"""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rwkv, rwkv7]
---

# RWKV-7, {parameter_count(config):,} parameters

{config.num_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size:,}, weights in {_name(dtype)}; trained
with streaming-rwkv. Before you publish it, add the training data, its licence, and results.

```python
import fla  # pip install flash-linear-attention; registers the architecture
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("."){loads_tokenizer if tokenizer else ""}
```
"""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_overwrites_nothing(out: Path) -> None:
    """Check that no earlier export is at `out`.

    Raises:
        UserError: there is one.
    """
    names = ("model.safetensors", "config.json", CARD_NAME)
    found = out if out.suffix == ".pth" and out.exists() else None
    found = found or next((out / name for name in names if out.suffix != ".pth" and (out / name).exists()), None)
    if found is not None:
        raise UserError(f"{found}: exists already; name another place, or replace it with --overwrite")


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


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m streaming_rwkv.export`, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m streaming_rwkv.export", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("checkpoint", help="a .pth, a Hugging Face folder, a training run or checkpoint, also on s3://")
    parser.add_argument("out", help="NAME.pth, or a folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--tokenizer", help="for a folder; default: the tokenizer stored with the checkpoint, if any")
    options = parser.parse_args(arguments)
    tolerate_any_encoding()
    try:
        out = _local_out(options.out)
        if not options.overwrite:
            check_overwrites_nothing(out)
        with local_checkpoint(options.checkpoint) as checkpoint:
            tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else find_tokenizer(checkpoint)
            export(checkpoint, out, dtype=DTYPES[options.dtype], tokenizer=tokenizer)
    except UserError as error:
        print_error(error)
        return 1
    without = "" if tokenizer or out.suffix == ".pth" else ", without a tokenizer: none is stored with it"
    files = [out] if out.is_file() else [file for file in out.iterdir() if file.is_file()]
    size = shown_bytes(sum(file.stat().st_size for file in files))
    print(f"wrote {shown(str(out))}: {size}, {options.dtype}{without}")
    if out.suffix == ".pth":
        print(f"load it with: python -m streaming_rwkv.generate {shown(str(out))} PROMPT --tokenizer NAME, or `rwkv`")
    else:
        print(
            f"load it with: import fla; AutoModelForCausalLM.from_pretrained({shown(str(out))!r}); see its {CARD_NAME}"
        )
    return 0


def _local_out(name: str) -> Path:
    out = Path(checked_local(name, remedy="give a local path, and copy the export from there"))
    if out.suffix == ".pth" and out.is_dir():
        raise UserError(f"{out}: is a folder, but a .pth is one file; use another name")
    if out.suffix != ".pth" and out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name NAME.pth, or a folder")
    return out


if __name__ == "__main__":
    sys.exit(main())
