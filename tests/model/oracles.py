"""Logits of a `.pth` by two implementations that nobody here wrote. Runs as a process of its own:

    python oracles.py rwkv|rwkv7_hf CHECKPOINT.pth OUT.npy TOKEN…
    python oracles.py huggingface FOLDER OUT.npy TOKEN…
    python oracles.py convert CHECKPOINT.pth FOLDER

`rwkv` reads switches from the environment at import and changes torch's global settings.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import torch


def by_rwkv(path: str, tokens: list[int]) -> torch.Tensor:
    """BlinkDL's `rwkv`, token by token: its (T, V) logits."""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    from rwkv.model import RWKV

    model, state, rows = RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32"), None, []
    for token in tokens:
        logits, state = model.forward([token], state)
        rows.append(logits.float())
    return torch.stack(rows)


def by_rwkv7_hf(path: str, tokens: list[int]) -> torch.Tensor:
    """`rwkv7_hf` by its own converter: its (T, V) logits."""
    from rwkv7_hf.converter import build_template_model, infer_config, prepare_translated_weight, translate_name

    weights = torch.load(path, weights_only=True)
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
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0]


def by_huggingface(folder: str, tokens: list[int]) -> torch.Tensor:
    """`rwkv7_hf` from a Hugging Face folder, as its users load one: (T, V) logits."""
    from rwkv7_hf import RWKV7ForCausalLM

    model, loading = RWKV7ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading  # nothing missing, nothing unexpected
    with torch.no_grad():
        return model.float().eval()(torch.tensor([tokens])).logits[0]


def main(oracle: str, checkpoint: str, out: str, *ids: str) -> None:
    torch.set_num_threads(1)
    if oracle == "convert":
        from rwkv7_hf.converter import main as convert

        convert(["--input", checkpoint, "--output", out, "--precision", "fp32"])
        return
    by = {"rwkv": by_rwkv, "rwkv7_hf": by_rwkv7_hf, "huggingface": by_huggingface}[oracle]
    np.save(out, by(checkpoint, [int(token) for token in ids]).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
