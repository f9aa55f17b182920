"""Greedy text by BlinkDL's package `rwkv`, in a process of its own: it reads the environment when it is imported.

python rwkv_worker.py MODEL.pth TOKENIZER END PROMPT OUT.json

TOKENIZER is a tokenizer.json, or the name of a vocabulary that the package brings; END begins and ends a document.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")

from rwkv.model import RWKV
from rwkv.utils import PIPELINE

MOST_TOKENS = 100


def main(path: str, tokenizer: str, end: int, prompt: str, out: Path) -> None:
    model = RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32")
    pipeline = PIPELINE(model, tokenizer)
    logits, state = model.forward([end, *pipeline.encode(prompt)], None)
    ids: list[int] = []
    while (token := int(logits.argmax())) != end and len(ids) < MOST_TOKENS:
        ids.append(token)
        logits, state = model.forward([token], state)
    out.write_text(json.dumps([ids, pipeline.decode(ids)]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
