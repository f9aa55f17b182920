"""The layout of transformers' own RWKV-7, and GGUF files as PyPI's `gguf` reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import safetensors.torch
import torch
from torch import Tensor

from streaming_rwkv.model.gguf import Field, Vocabulary, write_gguf
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.state import model_state
from streaming_rwkv.model.weights import (
    CheckpointError,
    read_model,
    read_state,
    write_huggingface,
    write_pth,
)

Build = Callable[..., RWKV7]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNUSED = {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_through_transformers_layout_is_bitwise(
    dtype: torch.dtype, random_model: Build, tmp_path: Path
) -> None:
    model = random_model().to(dtype)
    write_huggingface(model_state(model), tmp_path / "a", dtype=dtype, layout="transformers")
    loaded = read_model(tmp_path / "a", dtype=dtype)
    assert loaded.config == model.config
    assert all(torch.equal(value, model_state(model)[name]) for name, value in model_state(loaded).items())
    write_huggingface(read_state(tmp_path / "a"), tmp_path / "b", dtype=dtype, layout="transformers")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_both_layouts_hold_the_same_weights(random_model: Build, tmp_path: Path) -> None:
    state = model_state(random_model())
    write_huggingface(state, tmp_path / "fla", dtype=torch.float32)
    write_huggingface(read_state(tmp_path / "fla"), tmp_path / "native", dtype=torch.float32, layout="transformers")
    write_huggingface(read_state(tmp_path / "native"), tmp_path / "again", dtype=torch.float32)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "fla" / "model.safetensors"
    ).read_bytes()


def test_transformers_names_and_shapes(random_model: Build, tmp_path: Path) -> None:
    model = random_model(num_layers=2, hidden_size=64, decay_rank=3, a_rank=4, v_rank=5, gate_rank=6, vocab_size=7)
    write_huggingface(model_state(model), tmp_path, layout="transformers", bos_id=1, eos_id=2)
    weights = weights_of(tmp_path)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    assert shapes["rwkv7.emb.weight"] == shapes["head.weight"] == (7, 64)
    assert shapes["rwkv7.blocks.1.att.w1"] == (64, 3)  # not transposed
    assert shapes["rwkv7.blocks.0.att.k_k"] == shapes["rwkv7.blocks.0.ffn.x_k"] == (1, 1, 64)
    assert shapes["rwkv7.blocks.0.att.v2"] == (5, 64)
    assert not weights["rwkv7.blocks.0.att.v1"].any()
    assert {name for name in weights if not name.startswith("rwkv7.")} == {"head.weight"}
    assert len(weights) == len(model_state(model)) + 3
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Rwkv7ForCausalLM"]
    assert [config[key] for key in ("model_type", "num_heads", "bos_token_id", "eos_token_id", "pad_token_id")] == [
        "rwkv7", 1, 1, 2, 2
    ]  # fmt: skip
    assert [config[f"{name}_low_rank_dim"] for name in ("decay", "a", "v", "gate")] == [3, 4, 5, 6]


def test_a_file_of_transformers_weights_is_read_without_its_folder(random_model: Build, tmp_path: Path) -> None:
    state = model_state(random_model())
    write_huggingface(state, tmp_path / "native", dtype=torch.float32, layout="transformers")
    found = read_state(shutil.copy(tmp_path / "native" / "model.safetensors", tmp_path / "model.safetensors"))
    assert found.keys() - UNUSED == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_what_layer_0_does_not_use_survives(random_model: Build, tmp_path: Path) -> None:
    model = random_model(v_rank=5)
    write_pth(model_state(model), tmp_path / "a.pth", dtype=torch.float32)
    weights = torch.load(tmp_path / "a.pth") | {"blocks.0.att.v1": torch.full((model.config.hidden_size, 5), 0.25)}
    torch.save(weights, tmp_path / "b.pth")
    write_huggingface(read_state(tmp_path / "b.pth"), tmp_path / "hf", dtype=torch.float32, layout="transformers")
    write_pth(read_state(tmp_path / "hf"), tmp_path / "c.pth", dtype=torch.float32)
    again = torch.load(tmp_path / "c.pth")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_names_of_no_layout_and_of_two_are_refused(random_model: Build, tmp_path: Path) -> None:
    write_huggingface(model_state(random_model()), tmp_path / "fla")
    write_huggingface(model_state(random_model()), tmp_path / "native", layout="transformers")
    for name, message in (
        (
            "rwkv7.embeddings.weight",
            r"unknown parameter rwkv7\.embeddings\.weight; expected the names of fla .* or of tr",
        ),
        ("rwkv7.emb.weight", r"has names of two layouts, transformers' rwkv7\.emb\.weight and fla's "),
    ):
        folder = Path(shutil.copytree(tmp_path / "fla", tmp_path / name))
        weights = weights_of(folder)
        weights[name] = weights["model.embeddings.weight"].clone()
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            read_state(folder)


VOCABULARY = Vocabulary(
    tokens=[b"<s>", b"a", b"b"],
    types=[3, 1, 1],
    fields=[
        Field(key="tokenizer.ggml.model", kind="string", value="gpt2"),
        Field(key="tokenizer.ggml.merges", kind="string", value=["a b"]),
        Field(key="tokenizer.ggml.add_bos_token", kind="bool", value=True),
    ],
)


def values_of(reader: gguf.GGUFReader) -> dict[str, object]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def as_torch(tensor: gguf.ReaderTensor) -> Tensor:
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


@pytest.fixture
def small(random_model: Build) -> RWKV7:
    return random_model(num_layers=2, hidden_size=64, decay_rank=3, a_rank=4, v_rank=5, gate_rank=6, vocab_size=7)


def test_gguf_metadata_is_that_of_llama_cpps_converter(small: RWKV7, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(model_state(small), small.config, path, dtype=torch.float16, vocabulary=VOCABULARY, name="tiny")
    values = values_of(gguf.GGUFReader(path))
    assert values.pop("rwkv7.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert values == {
        "general.architecture": "rwkv7",
        "general.type": "model",
        "general.name": "tiny",
        "general.file_type": gguf.LlamaFileType.MOSTLY_F16,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        gguf.Keys.LLM.CONTEXT_LENGTH.format(arch="rwkv7"): 1048576,
        gguf.Keys.LLM.EMBEDDING_LENGTH.format(arch="rwkv7"): 64,
        gguf.Keys.LLM.BLOCK_COUNT.format(arch="rwkv7"): 2,
        gguf.Keys.LLM.FEED_FORWARD_LENGTH.format(arch="rwkv7"): small.config.ffn_size,
        gguf.Keys.WKV.HEAD_SIZE.format(arch="rwkv7"): 64,
        gguf.Keys.Attention.DECAY_LORA_RANK.format(arch="rwkv7"): 3,
        gguf.Keys.Attention.ICLR_LORA_RANK.format(arch="rwkv7"): 4,
        gguf.Keys.Attention.VALUE_RESIDUAL_MIX_LORA_RANK.format(arch="rwkv7"): 5,
        gguf.Keys.Attention.GATE_LORA_RANK.format(arch="rwkv7"): 6,
        gguf.Keys.Attention.HEAD_COUNT.format(arch="rwkv7"): 0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.tokens": ["<s>", "a", "b", "[PAD3]", "[PAD4]", "[PAD5]", "[PAD6]"],
        "tokenizer.ggml.token_type": [3, 1, 1, 5, 5, 5, 5],
    }


def test_gguf_tensors_are_all_that_the_architecture_has(small: RWKV7, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(model_state(small), small.config, path, dtype=torch.float16, vocabulary=VOCABULARY, name="tiny")
    expected = set()
    for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.RWKV7]:
        name = gguf.TENSOR_NAMES[kind]
        for layer in range(2) if "{bid}" in name else [0]:
            expected.add(name.format(bid=layer) + ".weight")
            if "norm" in name or name.endswith("mix_ln"):
                expected.add(name.format(bid=layer) + ".bias")
    assert {tensor.name for tensor in gguf.GGUFReader(path).tensors} == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_gguf_tensors_are_the_weights_bit_for_bit(dtype: torch.dtype, small: RWKV7, tmp_path: Path) -> None:
    model = small.to(dtype)
    path, state = tmp_path / "model.gguf", model_state(model)
    write_gguf(state, model.config, path, dtype=dtype, vocabulary=VOCABULARY, name="tiny")
    reader = gguf.GGUFReader(path)
    found = {tensor.name: as_torch(tensor) for tensor in reader.tensors}
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}

    def check(name: str, expected: Tensor) -> None:
        assert found[name].shape == expected.shape, name
        assert torch.equal(found[name], expected.float()), name

    check("token_embd.weight", state["emb.weight"])
    check("token_embd_norm.bias", state["blocks.0.ln0.bias"])
    check("output.weight", state["head.weight"])
    check("blk.1.time_mix_w1.weight", state["blocks.1.att.w1"].T)
    check("blk.1.time_mix_v2.weight", state["blocks.1.att.v2"].T)
    check("blk.0.time_mix_v2.weight", state["blocks.0.att.a2"].T)  # not used there
    check("blk.1.time_mix_r_k.weight", state["blocks.1.att.r_k"].flatten())
    check("blk.1.time_mix_w0.weight", state["blocks.1.att.w0"].flatten())
    check("blk.1.attn_norm_2.weight", state["blocks.1.ln2.weight"])
    check("blk.1.time_mix_output.weight", state["blocks.1.att.output.weight"])
    check("blk.1.channel_mix_lerp_k.weight", state["blocks.1.ffn.x_k"].flatten())
    check(
        "blk.1.time_mix_lerp_fused.weight",
        torch.stack([state[f"blocks.1.att.x_{mix}"] for mix in ("r", "w", "k", "v", "a", "g")]),
    )
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert types["token_embd.weight"] == types["blk.1.time_mix_a1.weight"] == name
    assert {types[f"blk.1.time_mix_{part}.weight"] for part in ("w1", "w2", "w0", "lerp_fused")} == {"F32"}


def test_weights_that_are_not_finite_in_a_gguf_are_refused(small: RWKV7, tmp_path: Path) -> None:
    state = model_state(small) | {"head.weight": torch.full((7, 64), 1e6)}
    with pytest.raises(CheckpointError, match=r"output\.weight: has values that are not finite, or too large for"):
        write_gguf(state, small.config, tmp_path / "m.gguf", dtype=torch.float16, vocabulary=VOCABULARY, name="")
    assert not list(tmp_path.iterdir())
