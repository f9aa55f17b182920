"""Tokenizers in GGUF files."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, trainers

from streaming_rwkv.inference import command_line
from streaming_rwkv.inference.gguf_vocabulary import GgufError, gguf_vocabulary
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.model.state import model_state
from streaming_rwkv.model.weights import read_state, write_pth
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer


def trained(folder: Path, **changes: Any) -> Tokenizer:
    """A byte-level BPE as `prep train-tokenizer` makes it, with changes."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, value in changes.items():
        setattr(bpe, name, value)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the cat and the hat and the bat"] * 3, trainer)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def fields(tokenizer: Tokenizer) -> dict[str, object]:
    return {field.key.removeprefix("tokenizer."): field.value for field in gguf_vocabulary(tokenizer).fields}


def test_our_own_bpe_vocabulary(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path / "bpe")
    vocabulary = gguf_vocabulary(tokenizer)
    assert len(vocabulary.tokens) == len(vocabulary.types) == tokenizer.vocab_size
    assert vocabulary.tokens[0] == b"<|endoftext|>"
    assert vocabulary.types[:3] == [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.NORMAL]
    (the,) = tokenizer.encode(" the").tolist()
    assert vocabulary.tokens[the] == "Ġthe".encode()
    found = fields(tokenizer)
    merges = found.pop("ggml.merges")
    assert isinstance(merges, list)
    assert "Ġ the" in merges
    assert found == {
        "ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.bos_token_id": 0, "ggml.eos_token_id": 0,
        "ggml.add_bos_token": True,
    }  # fmt: skip


def test_worlds_vocabulary() -> None:
    world = load_tokenizer("rwkv-world")
    vocabulary = gguf_vocabulary(world)
    assert vocabulary.tokens[0] == b"<s>"
    assert vocabulary.types[0] == gguf.TokenType.CONTROL
    for text in ("Today", "\n\n", "'", '"', "\\", "今"):
        (index,) = world.encode(text).tolist()
        written = vocabulary.tokens[index].decode()
        quote = '"' if "'" in written else "'"
        assert ast.literal_eval(f"b{quote}{written}{quote}") == text.encode()
    assert fields(world) == {
        "ggml.model": "rwkv", "ggml.bos_token_id": 0, "ggml.eos_token_id": 0, "ggml.eot_token_id": 261,
        "chat_template": "rwkv-world",
    }  # fmt: skip
    assert world.encode("\n\n").tolist() == [261]


def llama3(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def test_llama_3s_way_to_split_words_is_recognized(tmp_path: Path) -> None:
    assert fields(trained(tmp_path / "llama", pre_tokenizer=llama3(LLAMA3)))["ggml.pre"] == "llama-bpe"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pre_tokenizer": llama3(r"\p{L}+")},
            "splits words by Split, ByteLevel with a pattern that is neither GPT-2's",
        ),
        (
            {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
            "splits words by ByteLevel with a pattern",
        ),
        ({"normalizer": normalizers.NFKC()}, "is not byte-level BPE without a normalizer"),
    ],
)
def test_what_llama_cpp_would_tokenize_otherwise_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(GgufError, match=message):
        gguf_vocabulary(trained(tmp_path / "bpe", **changes))


def exported(out: Path, *options: str, vocab_size: int = 280) -> int:
    network = RWKV7(RWKV7Config(vocab_size=vocab_size, hidden_size=64, num_layers=1))
    initialize(network, seed=1)
    out.parent.mkdir(exist_ok=True)
    write_pth(model_state(network), out.parent / "model.pth")
    return command_line.export([str(out.parent / "model.pth"), str(out), *options])


def test_the_command_writes_model_and_tokenizer(tmp_path: Path) -> None:
    trained(tmp_path / "bpe").save(tmp_path / "bpe")
    out = tmp_path / "place" / "tiny.gguf"
    assert exported(out, "--tokenizer", str(tmp_path / "bpe")) == 0
    reader = gguf.GGUFReader(out)
    tokens: Sequence[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 280
    assert tokens[-1] == "[PAD279]"
    assert reader.fields["general.name"].contents() == "tiny"
    assert {tensor.name: tuple(tensor.shape) for tensor in reader.tensors}["token_embd.weight"] == (64, 280)


def test_a_gguf_needs_the_models_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "bpe").save(tmp_path / "bpe")
    assert exported(tmp_path / "place" / "a.gguf") == 1
    assert "a .gguf holds its tokenizer, and none is stored with the checkpoint" in capsys.readouterr().err
    assert exported(tmp_path / "place" / "a.gguf", "--tokenizer", str(tmp_path / "bpe"), vocab_size=100) == 1
    assert "the model has 100 tokens, the tokenizer" in capsys.readouterr().err


def test_the_command_writes_transformers_layout(tmp_path: Path) -> None:
    trained(tmp_path / "bpe").save(tmp_path / "bpe")
    out = tmp_path / "place" / "hf"
    assert exported(out, "--layout", "transformers", "--tokenizer", str(tmp_path / "bpe")) == 0
    assert '"Rwkv7ForCausalLM"' in (out / "config.json").read_text()
    assert (out / "tokenizer.json").is_file()
    assert torch.equal(
        torch.load(tmp_path / "place" / "model.pth")["emb.weight"],
        read_state(out)["emb.weight"],
    )
