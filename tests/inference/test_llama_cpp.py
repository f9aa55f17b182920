"""GGUF files as llama.cpp reads and computes them, through llama-cpp-python, where that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streaming_rwkv.inference.export import export
from streaming_rwkv.model.state import model_state
from streaming_rwkv.model.weights import write_pth
from streaming_rwkv.tokenizer import load_tokenizer
from tests.inference.small_models import bpe, random_model

llama_cpp: Any = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow

TEXTS = [
    "the cat and the hat",
    "Today is a beautiful day. 今天是美好的一天。",
    "  two  spaces\n\n\nand lines\r\n\ttabs, don't 1234567 ",
    "🎉 é e\u0301 नमस्ते",
]
NEW_TOKENS = 24


@pytest.mark.parametrize("vocabulary", ["rwkv-world", "bpe"])
def test_llama_cpp_gives_our_ids_logits_and_greedy_text(vocabulary: str, tmp_path: Path) -> None:
    words = (
        load_tokenizer("rwkv-world")
        if vocabulary == "rwkv-world"
        else bpe(tmp_path / "words", vocab_size=300, texts=TEXTS)
    )
    model = random_model(vocab_size=words.vocab_size)
    write_pth(model_state(model), tmp_path / "model.pth", dtype=torch.float32)
    export(tmp_path / "model.pth", tmp_path / "model.gguf", dtype=torch.float32, tokenizer=words)
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    for text in TEXTS:
        ids = words.encode(text).tolist()
        assert llama.tokenize(text.encode(), add_bos=False) == ids
        assert llama.detokenize(ids) == text.encode()
        if vocabulary == "bpe":  # llama.cpp begins no text of World's with bos
            assert llama.tokenize(text.encode(), add_bos=True) == [words.bos_id, *ids]
        llama.reset()
        llama.eval([words.bos_id, *ids])
        greedy: list[int] = []
        while len(greedy) < NEW_TOKENS:
            greedy.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            llama.eval(greedy[-1:])
        found = torch.from_numpy(llama.scores[: llama.n_tokens].copy())
        with torch.no_grad():
            ours = model(torch.tensor([[words.bos_id, *ids, *greedy]]))[0]
        # float32 sums in another order, and llama.cpp's own exp and sigmoid: 7e-6 was found, beside logits of 5
        torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
        assert ours[len(ids) : -1].argmax(dim=-1).tolist() == greedy
    llama.close()
