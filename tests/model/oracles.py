"""Logits by two implementations that nobody here wrote. Runs as a process of its own:

    python oracles.py FOLDER TOKEN…

FOLDER holds model.pth and huggingface/, the same weights; into it go rwkv.npy and rwkv7_hf.npy, (T, V) logits from
the file, huggingface.npy from the folder, and converted/, the file as rwkv7_hf's own converter writes it.
`rwkv` reads switches from the environment at import and changes torch's global settings.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def by_rwkv(file: Path, tokens: list[int]) -> Tensor:
    """BlinkDL's `rwkv`, token by token."""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    from rwkv.model import RWKV

    model, state, rows = RWKV(model=str(file).removesuffix(".pth"), strategy="cpu fp32"), None, []
    for token in tokens:
        logits, state = model.forward([token], state)
        rows.append(logits.float())
    return torch.stack(rows)


def by_rwkv7_hf(file: Path, tokens: list[int]) -> Tensor:
    """`rwkv7_hf` with the names and layouts of its own converter."""
    from rwkv7_hf.converter import build_template_model, infer_config, prepare_translated_weight, translate_name

    weights = torch.load(file, weights_only=True)
    config = infer_config(weights, "float32", "reference", False)
    model = build_template_model(config, torch.float32)
    expected, translated = model.state_dict(), {}
    for name, value in weights.items():
        theirs, transposed = translate_name(name, config.num_hidden_layers)
        if theirs:
            translated[theirs] = prepare_translated_weight(
                value,
                src_name=name,
                dst_name=theirs,
                transposed=transposed,
                expected=expected[theirs],
                dtype=torch.float32,
            )
    model.load_state_dict(translated)
    return model.eval()(torch.tensor([tokens])).logits[0]


def by_huggingface(folder: Path, tokens: list[int]) -> Tensor:
    """`rwkv7_hf` from a Hugging Face folder, as its users load one."""
    from rwkv7_hf import RWKV7ForCausalLM

    model, loading = RWKV7ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading  # nothing missing, nothing unexpected
    return model.float().eval()(torch.tensor([tokens])).logits[0]


@torch.no_grad()
def main(folder: Path, tokens: list[int]) -> None:
    from rwkv7_hf.converter import main as convert

    torch.set_num_threads(1)
    file = folder / "model.pth"
    np.save(folder / "rwkv.npy", by_rwkv(file, tokens).numpy())
    np.save(folder / "rwkv7_hf.npy", by_rwkv7_hf(file, tokens).numpy())
    np.save(folder / "huggingface.npy", by_huggingface(folder / "huggingface", tokens).numpy())
    convert(["--input", str(file), "--output", str(folder / "converted"), "--precision", "fp32"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(token) for token in sys.argv[2:]])
