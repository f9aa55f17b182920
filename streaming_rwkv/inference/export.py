"""Export of weights for other programs: `streaming-rwkv export CHECKPOINT OUT`.

An OUT that ends with .pth is written in BlinkDL's format (`rwkv`, RWKV-Runner, his trainers), one that ends with .gguf
in llama.cpp's; any other OUT is a Hugging Face folder with the tokenizer (`fla`, `rwkv7_hf`, or transformers' own). A
self-contained folder holds the model's code too, with which transformers alone loads it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.config import UserError
from streaming_rwkv.console import shown, shown_bytes
from streaming_rwkv.filesystem import explained_writes, read_regular_file, sole_writer, write_atomically
from streaming_rwkv.inference.gguf_vocabulary import GgufError, gguf_vocabulary
from streaming_rwkv.inference.loading import find_tokenizer
from streaming_rwkv.location import checked_local
from streaming_rwkv.model.flops import parameter_count
from streaming_rwkv.model.gguf import write_gguf
from streaming_rwkv.model.state import infer_config
from streaming_rwkv.model.weights import WEIGHTS_NAME, Layout, is_of_rwkv7, read_state, write_huggingface, write_pth
from streaming_rwkv.outputs import CHECKPOINTS, MARK_NAME, check_outside
from streaming_rwkv.shards import MANIFEST_NAME
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from streaming_rwkv.train.checkpoints.restore import local_checkpoint
from streaming_rwkv.version import PROGRAM

CARD_NAME = "README.md"
_LARGEST_CARD_BYTES = 1 << 20
_CARD_END = "\n<!-- written by streaming-rwkv; a card that was edited is not replaced: "
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FILE_SUFFIXES = (".pth", ".gguf")
_OTHER_FORMATS = (".safetensors", ".st", ".pt", ".bin", ".ckpt", ".onnx", ".txt", ".json")  # not a folder's name either
_IMPORT_FLA = "import fla"  # registers the architecture
_TRUSTS = ", trust_remote_code=True"  # for code that exports carry, these modules of this package
_MODEL_CODE, _TOKENIZER_CODE, _WORLD_CODE = "modeling_rwkv7", "tokenization_rwkv7", "tokenization_rwkv_world"
_AUTO_MAP = {
    "AutoConfig": f"{_MODEL_CODE}.RWKV7Config",
    "AutoModelForCausalLM": f"{_MODEL_CODE}.RWKV7ForCausalLM",
}
_SELF_CONTAINED = f"""
The code is in `{_MODEL_CODE}.py`, and needs torch and transformers alone. The tokenizer begins each text with bos, as
documents began in training. Standard tasks:

    lm_eval --model hf --model_args pretrained=.,trust_remote_code=True --tasks lambada_openai
"""


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    layout: Layout = "fla",
    self_contained: bool = False,
    overwrite: bool = True,
) -> None:
    """Write the weights of any checkpoint that `read_state` reads, and into a folder also the tokenizer.

    Args:
        self_contained: add the model's code to a folder; its layout must be fla's.
        overwrite: replace an earlier export; other files, and a README.md that was edited, are never replaced.
    Raises:
        CheckpointError: it cannot be read, or the Hugging Face implementations do not support its head size.
        UserError: the place cannot be written, another process writes there, an earlier export is there, or the folder
            holds other files.
    """
    state = read_state(checkpoint)
    write_export(
        state,
        out,
        dtype=dtype,
        tokenizer=tokenizer,
        layout=layout,
        self_contained=self_contained,
        overwrite=overwrite,
    )


def write_export(
    state: Mapping[str, Tensor],
    out: Path,
    *,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    layout: Layout = "fla",
    self_contained: bool = False,
    overwrite: bool = True,
) -> None:
    """Write weights to a file or folder: see `export`."""
    is_folder = out.suffix not in FILE_SUFFIXES
    with sole_writer(out, what="export", remedy="name another place", is_folder=is_folder), explained_writes(out):
        check_out(out, overwrite=overwrite)  # again: another process may have written it before this one held it
        was_empty = is_folder and not visible_files(out)
        try:
            _write(state, out, dtype=dtype, tokenizer=tokenizer, layout=layout, self_contained=self_contained)
        except BaseException:
            if was_empty:
                for file in visible_files(out):  # a half export would be in the way of the next
                    file.unlink()
            raise


def _write(
    state: Mapping[str, Tensor],
    out: Path,
    *,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    layout: Layout,
    self_contained: bool,
) -> None:
    if out.suffix == ".pth":
        write_pth(state, out, dtype=dtype)
        return
    if out.suffix == ".gguf":
        _write_gguf(state, out, dtype=dtype, tokenizer=tokenizer)
        return
    bos_id = None if tokenizer is None else tokenizer.bos_id
    eos_id = None if tokenizer is None else tokenizer.eos_id
    if self_contained:
        _copy_code(_MODEL_CODE, out)
    if tokenizer is not None:
        tokenizer.save(out)
        _write_tokenizer_config(tokenizer, out, self_contained=self_contained)
    auto_map = _AUTO_MAP if self_contained else None
    write_huggingface(state, out, dtype=dtype, bos_id=bos_id, eos_id=eos_id, layout=layout, auto_map=auto_map)
    if tokenizer is not None:
        generation = {
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "pad_token_id": eos_id,
            "do_sample": True,
            "top_p": 0.9,
        }
        write_atomically(out / "generation_config.json", (json.dumps(generation, indent=1) + "\n").encode())
    card = model_card(state, dtype=dtype, tokenizer=tokenizer, layout=layout, self_contained=self_contained)
    if not (out / CARD_NAME).exists() or _is_as_written(out / CARD_NAME):
        write_atomically(out / CARD_NAME, card.encode())


def _is_as_written(card: Path) -> bool:
    """Return whether a model card is one of this program that nobody has edited: its last line has its hash."""
    try:
        text = read_regular_file(card, most=_LARGEST_CARD_BYTES).decode()
    except (UserError, OSError, UnicodeDecodeError):
        return False
    body, begin, _ = text.rpartition(_CARD_END)
    return bool(begin) and text == _with_hash(body)


def _with_hash(card: str) -> str:
    return f"{card}{_CARD_END}{hashlib.sha256(card.encode()).hexdigest()} -->\n"


def model_card(
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    layout: Layout = "fla",
    self_contained: bool = False,
) -> str:
    """Return the README.md of an exported folder: what the model is and how it is loaded.

    Its last line, which is not shown, has the hash of the others: an edited card is not replaced.
    """
    config = infer_config(state, where="export")
    needs_fla = layout == "fla" and not self_contained
    registers = f"{_IMPORT_FLA}  # pip install flash-linear-attention\n" if needs_fla else ""
    trusts = _TRUSTS if self_contained else ""
    trusts_tokenizer = _TRUSTS if tokenizer is not None and tokenizer.kind == "rwkv-world" else trusts
    loads_tokenizer = f"""
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("."{trusts_tokenizer})"""
    return _with_hash(f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rwkv, rwkv7]
---

# RWKV-7, {parameter_count(config):,} parameters

{config.num_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size:,}, weights in {_name(dtype)}; trained
with streaming-rwkv. Before you publish it, add the training data, its licence, and results.

```python
{registers}from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("."{trusts}){loads_tokenizer if tokenizer else ""}
```
{_SELF_CONTAINED if self_contained else ""}""")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_out(out: Path, *, overwrite: bool) -> None:
    """Check that no earlier export is at `out`, unless it may be replaced, and that a folder has no other files.

    Hidden files, such as those of git, are ignored.

    Raises:
        UserError: there is one.
    """
    if out.suffix in FILE_SUFFIXES:
        earlier = out
    else:
        earlier = out / WEIGHTS_NAME
        if (files := visible_files(out)) and not (earlier.exists() and is_of_rwkv7(out)):
            raise UserError(
                f"{files[0]}: is in the folder to write to, which holds no earlier export; move it away, or name a new "
                "or empty folder"
            )
    if earlier.exists() and not overwrite:
        raise UserError(f"{earlier}: exists already; name another place, or replace it with --overwrite")


def visible_files(folder: Path) -> list[Path]:
    """Return what is in a folder, without hidden files and links that lead nowhere; it need not exist."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if file.exists() and not file.name.startswith(".")]


def how_to_load(out: Path, *, layout: Layout = "fla", self_contained: bool = False) -> str:
    """Return a line that says how an export is loaded."""
    name = shown(str(out))
    if out.suffix == ".pth":
        return f"load it with: {PROGRAM} generate {name} PROMPT --tokenizer NAME, or `rwkv`"
    if out.suffix == ".gguf":
        return f"load it with: llama-cli -m {name} -p PROMPT"
    registers = f"{_IMPORT_FLA}; " if layout == "fla" and not self_contained else ""
    arguments = f"{name!r}{_TRUSTS if self_contained else ''}"
    return f"load it with: {registers}AutoModelForCausalLM.from_pretrained({arguments}); see its {CARD_NAME}"


def export_bytes(out: Path) -> int:
    """Return the size of an export."""
    files = [out] if out.is_file() else [file for file in out.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _write_gguf(state: Mapping[str, Tensor], out: Path, *, dtype: torch.dtype, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        raise GgufError(f"{out}: a .gguf holds its tokenizer, and none is stored with the checkpoint; give --tokenizer")
    config = infer_config(state, where=str(out))
    if tokenizer.vocab_size > config.vocab_size:
        raise GgufError(
            f"{out}: the model has {config.vocab_size} tokens, the tokenizer {tokenizer.name!r} "
            f"{tokenizer.vocab_size}; name the one it was trained with by --tokenizer"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(state, config, out, dtype=dtype, vocabulary=gguf_vocabulary(tokenizer), name=out.stem)


def _copy_code(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.py", (Path(__file__).parents[1] / f"{name}.py").read_bytes())


def _write_tokenizer_config(tokenizer: Tokenizer, folder: Path, *, self_contained: bool) -> None:
    """Write what `AutoTokenizer` needs to give the tokenizer's ids, and in self-contained folders to begin with bos.

    RWKV World's vocabulary needs code, since tokenizer.json cannot hold it; other tokenizers need it for bos alone.
    """
    file = folder / "tokenizer_config.json"
    config: dict[str, Any]
    if tokenizer.kind == "rwkv-world":
        _copy_code(_WORLD_CODE, folder)
        config = {
            "tokenizer_class": "RWKVWorldTokenizer",
            "auto_map": {"AutoTokenizer": [f"{_WORLD_CODE}.RWKVWorldTokenizer", None]},
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
            "clean_up_tokenization_spaces": False,
        }
        if self_contained:
            config["starts_with_bos"] = True
    else:
        config = json.loads(file.read_text(encoding="utf-8"))
        config["model_input_names"] = ["input_ids", "attention_mask"]  # `generate` refuses token_type_ids
        if self_contained:
            _copy_code(_TOKENIZER_CODE, folder)
            config["tokenizer_class"] = "RWKV7TokenizerFast"
            config["auto_map"] = {"AutoTokenizer": [None, f"{_TOKENIZER_CODE}.RWKV7TokenizerFast"]}
            config["pad_token"] = config["eos_token"]
    if self_contained:
        config["padding_side"] = "left"  # texts are continued at the right
    write_atomically(file, (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode())


def run(options: argparse.Namespace) -> int:
    """Export a checkpoint, say where it is and how it is loaded, and return the exit status."""
    out = local_out(options.out)
    check_out(out, overwrite=options.overwrite)
    with local_checkpoint(options.checkpoint) as checkpoint:
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else find_tokenizer(checkpoint)
        export(
            checkpoint,
            out,
            dtype=DTYPES[options.dtype],
            tokenizer=tokenizer,
            layout=options.layout,
            self_contained=options.self_contained,
            overwrite=options.overwrite,
        )
    without = "" if tokenizer or out.suffix in FILE_SUFFIXES else ", without a tokenizer: none is stored with it"
    print(f"wrote {shown(str(out))}: {shown_bytes(export_bytes(out))}, {options.dtype}{without}")
    print(how_to_load(out, layout=options.layout, self_contained=options.self_contained))
    return 0


def local_out(name: str) -> Path:
    """Return the path to write to.

    Raises:
        UserError: not on this machine, a run or a checkpoint, or of the other kind than what is written: a file, or a
            folder.
    """
    out = Path(checked_local(name, remedy="give a local path, and copy the export from there"))
    if out.suffix in FILE_SUFFIXES and out.is_dir():
        raise UserError(f"{out}: is a folder, but a {out.suffix} is one file; use another name")
    if out.suffix not in FILE_SUFFIXES and out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name NAME.pth, NAME.gguf, or a folder")
    if out.suffix in _OTHER_FORMATS and not out.is_dir():
        raise UserError(f"{out}: is no format of an export; name NAME.pth, NAME.gguf, or a folder")
    check_outside(out.parent, what="export", remedy="name a folder of its own elsewhere")
    kinds = {CHECKPOINTS: "a training run", MARK_NAME: "a checkpoint", MANIFEST_NAME: "a data set"}
    for name, kind in kinds.items():
        if (out / name).exists():
            raise UserError(f"{out}: is {kind}, with which an export there would be confused; name a folder of its own")
    return out
