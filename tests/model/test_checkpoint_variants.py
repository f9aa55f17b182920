"""Files as other trainers write them, files that are not what they seem, and numbers that are no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.state import load_state, model_state
from streaming_rwkv.model.weights import CheckpointError, read_model, read_state, write_huggingface, write_pth

Build = Callable[..., RWKV7]


@pytest.fixture(scope="module")
def weights(random_model: Build) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model_state(random_model()).items()}


def saved(content: Any, file: Path) -> Path:
    torch.save(content, file)
    return file


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Files as other trainers write them


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"model.{name}",
        lambda name: f"module._orig_mod.model.{name}",
        lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
        lambda name: name.replace("blocks.0.att.", "blocks.0._checkpoint_wrapped_module.att._fsdp_wrapped_module."),
    ],
)
def test_prefixes_of_wrappers_are_removed_from_names(
    rename: Callable[[str], str], weights: dict[str, Tensor], tmp_path: Path
):
    file = saved({rename(name): value for name, value in weights.items()}, tmp_path / "model.pth")
    assert same(read_state(file), weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "global_step": 7},
        lambda state: {"model": state, "step": 7},
        lambda state: {"module": state, "dp_world_size": 8},
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},
        lambda state: {"state": {"model": {f"network.{name}": value for name, value in state.items()}}},
    ],
)
def test_weights_within_a_trainers_file_are_read(
    wrap: Callable[[Any], Any], weights: dict[str, Tensor], tmp_path: Path
):
    assert same(read_state(saved(wrap(weights), tmp_path / "last.ckpt")), weights)


@pytest.mark.parametrize("name", ["model.safetensors", "model.st"])
def test_a_safetensors_file_with_blinkdls_names_is_read(name: str, weights: dict[str, Tensor], tmp_path: Path):
    safetensors.torch.save_file(weights, tmp_path / name)
    assert same(read_state(tmp_path / name), weights)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_hugging_faces_names_need_their_folder(name: str, weights: dict[str, Tensor], tmp_path: Path):
    write_huggingface(weights, tmp_path / "hf", dtype=torch.float32)
    theirs = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    if name.endswith(".pth"):
        saved(theirs, tmp_path / "hf" / name)
    with pytest.raises(CheckpointError, match="Hugging Face's names, and it has no configuration; give the Hugging"):
        read_state(tmp_path / "hf" / name)


def tied(weights: dict[str, Tensor], folder: Path, **more: Tensor) -> Path:
    """A Hugging Face folder with one matrix for embedding and head."""
    write_huggingface(weights, folder, dtype=torch.float32)
    theirs = safetensors.torch.load_file(folder / "model.safetensors")
    del theirs["lm_head.weight"]
    safetensors.torch.save_file(theirs | more, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


def test_a_tied_head_is_the_embedding(weights: dict[str, Tensor], tmp_path: Path):
    model = read_model(tied(weights, tmp_path))
    assert same(model_state(model), weights | {"head.weight": weights["emb.weight"]})


def test_a_tied_head_of_its_own_is_refused(weights: dict[str, Tensor], tmp_path: Path):
    folder = tied(weights, tmp_path, **{"lm_head.weight": weights["emb.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight is not the embedding"):
        read_state(folder)


# Numbers that are no weights


def test_quantized_weights_are_refused_by_name(weights: dict[str, Tensor], tmp_path: Path):
    name = "blocks.0.att.key.weight"
    file = saved({**weights, name: torch.zeros_like(weights[name], dtype=torch.int8)}, tmp_path / "int8.pth")
    with pytest.raises(CheckpointError, match=rf"{name} is int8 .*quantized models cannot be read"):
        read_model(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, weights: dict[str, Tensor], tmp_path: Path):
    wrong = weights["head.weight"].clone()
    wrong[3, 5] = value
    file = saved({**weights, "head.weight": wrong}, tmp_path / "nan.pth")
    error = r"head\.weight: has values that are not finite: the training that wrote it has diverged"
    with pytest.raises(CheckpointError, match=error):
        read_model(file)
    with pytest.raises(CheckpointError, match=error):
        write_pth(read_state(file), tmp_path / "out.pth")
    with pytest.raises(CheckpointError, match=error):
        write_huggingface(read_state(file), tmp_path / "hf")
    assert not (tmp_path / "out.pth").exists()


def test_weights_that_float16_cannot_hold_are_refused_by_name(weights: dict[str, Tensor], tmp_path: Path):
    large = weights["emb.weight"].clone()
    large[3, 5] = 1e6
    state = {**weights, "emb.weight": large}
    error = r"emb\.weight: the largest of its values is 1e\+06, too large for float16, whose largest is 65504; take"
    with pytest.raises(CheckpointError, match=error):
        write_pth(state, tmp_path / "out.pth", dtype=torch.float16)
    with pytest.raises(CheckpointError, match=error):
        write_huggingface(state, tmp_path / "hf", dtype=torch.float16)
    with pytest.raises(CheckpointError, match=error):
        read_model(saved(state, tmp_path / "big.pth"), dtype=torch.float16)
    write_pth(state, tmp_path / "out.pth", dtype=torch.bfloat16)
    assert not list(tmp_path.glob("hf/*.safetensors"))


# Small files that claim large models


@pytest.mark.parametrize("layer", ["7", "100000000", "99999999999999999999"])
def test_a_gap_in_the_layers_is_refused(layer: str, weights: dict[str, Tensor], tmp_path: Path):
    file = saved({**weights, f"blocks.{layer}.att.v1": torch.zeros(2, 2)}, tmp_path / "gap.pth")
    with pytest.raises(CheckpointError, match=rf"none of blocks\.3; layers are numbered|has blocks\.{layer}\.att\.v1"):
        read_model(file)


def test_many_layers_of_one_tensor_each_are_refused_before_a_model_is_built(weights: dict[str, Tensor], tmp_path: Path):
    more = {f"blocks.{layer}.att.v1": torch.zeros(1) for layer in range(2, 200)}
    file = saved({**weights, **more}, tmp_path / "layers.pth")
    with pytest.raises(CheckpointError, match=r"has no blocks\.10\.att\.a0 \(.* 0 unknown\)$"):
        read_model(file)


def test_an_expanded_tensor_is_refused(weights: dict[str, Tensor], tmp_path: Path):
    file = saved({**weights, "emb.weight": torch.zeros(1, 128).expand(1 << 26, 128)}, tmp_path / "expanded.pth")
    with pytest.raises(
        CheckpointError, match=r"emb\.weight says that it has 8589934592 values, of which it stores fewer"
    ):
        read_model(file)


def test_tensors_that_share_one_storage_are_refused(weights: dict[str, Tensor], tmp_path: Path):
    large = torch.zeros(1 << 20)
    state = {**weights, **{f"blocks.{layer}.att.v1": large for layer in range(2, 12)}}
    file = saved(state, tmp_path / "shared.pth")
    with pytest.raises(CheckpointError, match=r"bytes of weights in \d+ bytes of files: many of them share one tensor"):
        read_model(file)


def test_an_embedding_that_is_the_head_too_is_fine(weights: dict[str, Tensor], tmp_path: Path):
    file = saved({**weights, "head.weight": weights["emb.weight"]}, tmp_path / "tied.pth")
    assert torch.equal(read_model(file).head.weight, weights["emb.weight"])


def test_a_model_keeps_its_weights_where_a_checkpoint_does_not_fit(random_model: Build, weights: dict[str, Tensor]):
    model = random_model(num_layers=4)
    with pytest.raises(CheckpointError, match=r"found a model of 3 layers, this one has 4"):
        load_state(model, weights, where="x")
