"""Weights in and out: round trips are bitwise, other programs agree, and no file runs code here."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from streaming_rwkv.model.huggingface_names import from_huggingface_name, to_huggingface_name
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.model.sharded import without_advice
from streaming_rwkv.model.state import infer_config, load_state, model_state
from streaming_rwkv.model.weights import CheckpointError, read_model, read_state, write_huggingface, write_pth
from tests.fork_server import ForkServer
from tests.rights import without_rights

Build = Callable[..., RWKV7]
UNUSED = ["blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pth_round_trip_is_bitwise(dtype: torch.dtype, random_model: Build, tmp_path: Path) -> None:
    model = random_model().to(dtype)
    write_pth(model_state(model), tmp_path / "a.pth", dtype=dtype)
    loaded = read_model(tmp_path / "a.pth", dtype=torch.float32)
    assert loaded.config == model.config
    write_pth(model_state(loaded), tmp_path / "b.pth", dtype=dtype)
    first, second = torch.load(tmp_path / "a.pth"), torch.load(tmp_path / "b.pth")
    assert same(first, second)
    assert same({name: value for name, value in first.items() if name not in UNUSED}, model_state(model))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_has_blinkdls_keys_and_shapes(random_model: Build, tmp_path: Path) -> None:
    model = random_model(num_layers=12, hidden_size=64, decay_rank=3, a_rank=4, v_rank=5, gate_rank=6, vocab_size=7)
    write_pth(model_state(model), tmp_path / "model.pth")
    weights = torch.load(tmp_path / "model.pth", weights_only=True)
    assert len(weights) == 402
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    shapes = {name: list(value.shape) for name, value in weights.items() if name.startswith("blocks.0.")}
    vector, matrix = [1, 1, 64], [64, 64]
    assert shapes == {f"blocks.0.{name}": shape for name, shape in {
        "ln0.weight": [64], "ln0.bias": [64], "ln1.weight": [64], "ln1.bias": [64], "ln2.weight": [64],
        "ln2.bias": [64], "att.x_r": vector, "att.x_w": vector, "att.x_k": vector, "att.x_v": vector,
        "att.x_a": vector, "att.x_g": vector, "att.w0": vector, "att.w1": [64, 3], "att.w2": [3, 64],
        "att.a0": vector, "att.a1": [64, 4], "att.a2": [4, 64], "att.v0": vector, "att.v1": [64, 5],
        "att.v2": [5, 64], "att.g1": [64, 6], "att.g2": [6, 64], "att.k_k": vector, "att.k_a": vector,
        "att.r_k": [1, 64], "att.receptance.weight": matrix, "att.key.weight": matrix, "att.value.weight": matrix,
        "att.output.weight": matrix, "att.ln_x.weight": [64], "att.ln_x.bias": [64], "ffn.x_k": vector,
        "ffn.key.weight": [256, 64], "ffn.value.weight": [64, 256],
    }.items()}  # fmt: skip
    outer = sorted(name for name in weights if not name.startswith("blocks."))
    assert outer == ["emb.weight", "head.weight", "ln_out.bias", "ln_out.weight"]


def test_ranks_and_widths_are_inferred(random_model: Build) -> None:
    shape = {"decay_rank": 3, "a_rank": 4, "v_rank": 5, "gate_rank": 6, "head_size": 32, "ffn_size": 100}
    model = random_model(**shape)
    assert infer_config(model_state(model), where="x") == model.config


@pytest.mark.parametrize("layers", [1, 2])
def test_files_with_and_without_layer_0s_value_residual_load_alike(
    layers: int, random_model: Build, tmp_path: Path
) -> None:
    model = random_model(num_layers=layers)
    without = model_state(model)
    extra = {"blocks.0.att.v0": (1, 1, 128), "blocks.0.att.v1": (128, 32), "blocks.0.att.v2": (32, 128)}
    for name, state in {
        "early": without,
        "late": {**without, **{key: torch.ones(shape) for key, shape in extra.items()}},
    }.items():
        torch.save(state, tmp_path / f"{name}.pth")
        loaded = read_model(tmp_path / f"{name}.pth")
        assert loaded.config == model.config
        assert same(model_state(loaded), without)


def test_vectors_stored_flat_load_too(random_model: Build, tmp_path: Path) -> None:
    model = random_model()
    torch.save({name: value.squeeze() for name, value in model_state(model).items()}, tmp_path / "flat.pth")
    assert same(model_state(read_model(tmp_path / "flat.pth")), model_state(model))


def test_old_files_that_are_not_zipped_load_too(random_model: Build, tmp_path: Path) -> None:
    model = random_model()
    torch.save(model_state(model), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(model_state(read_model(tmp_path / "old.pth")), model_state(model))


def test_options_that_weights_do_not_determine_are_arguments(random_model: Build, tmp_path: Path) -> None:
    write_pth(model_state(random_model()), tmp_path / "model.pth")
    model = read_model(tmp_path / "model.pth", dtype=torch.float64, activation_checkpointing=True)
    assert model.config.activation_checkpointing
    assert model.blocks[0].activation_checkpointing
    assert model.emb.weight.dtype == torch.float64


# Hugging Face


def test_huggingface_round_trip_is_bitwise(random_model: Build, tmp_path: Path) -> None:
    model = random_model().bfloat16()
    write_huggingface(model_state(model), tmp_path / "hf", bos_id=3, eos_id=4)
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    loaded = read_model(tmp_path / "hf", dtype=torch.bfloat16)
    assert loaded.config == model.config
    assert same(model_state(loaded), model_state(model))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (3, 4, "bfloat16")


def test_rwkv7_hf_computes_our_logits_from_our_folder(oracles: Any) -> None:
    with torch.no_grad():
        logits = oracles.model(torch.tensor([oracles.tokens]))[0]
    torch.testing.assert_close(logits, oracles.logits["huggingface"], rtol=0, atol=1e-4)


def test_a_folder_that_rwkv7_hf_converted_is_the_file_it_came_from(oracles: Any) -> None:
    loaded = read_model(oracles.converted)
    assert loaded.config == oracles.model.config
    assert same(model_state(loaded), model_state(oracles.model))


def test_weights_in_several_files_are_read(random_model: Build, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = random_model()
    write_huggingface(model_state(model), tmp_path, dtype=torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    names = sorted(weights)
    for part, chosen in (("one.safetensors", names[:20]), ("two.safetensors", names[20:])):
        save_file({name: weights[name] for name in chosen}, tmp_path / part)
    index = {name: "one.safetensors" if name in names[:20] else "two.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "model.safetensors").unlink()
    assert same(model_state(read_model(tmp_path)), model_state(model))


def test_every_name_has_one_counterpart(random_model: Build) -> None:
    names = list(model_state(random_model()))
    theirs = [to_huggingface_name(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [from_huggingface_name(name) for name in theirs] == names
    assert to_huggingface_name("blocks.3.att.w1") == "model.layers.3.attn.w_lora.lora.0.weight"
    assert to_huggingface_name("blocks.0.ln0.bias") == "model.layers.0.pre_norm.bias"


# Training checkpoints


def training_state(model: RWKV7, root: str) -> dict[str, Any]:
    weights = {root + name: value for name, value in model_state(model).items()}
    moments = {root + name: {"exp_avg": torch.ones_like(value)} for name, value in model_state(model).items()}
    return {"model": weights, "optimizers": {"AdamW": {"state": moments}}}


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own: one process saves, and its TypedStorage is deprecated
        dcp.save(state, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize(("wrapper", "root"), [("state", "network."), (None, "")])
def test_a_sharded_checkpoint_is_read(wrapper: str | None, root: str, random_model: Build, tmp_path: Path) -> None:
    """Sharded checkpoints as Composer saves them, and as torch does."""
    model = random_model()
    state = training_state(model, root)
    save_sharded({wrapper: state} if wrapper else state, tmp_path)
    assert same(model_state(read_model(tmp_path)), model_state(model))


def test_a_shard_that_differs_from_its_mark_is_refused(random_model: Build, tmp_path: Path) -> None:
    save_sharded(training_state(random_model(), ""), tmp_path)
    size = (tmp_path / "__0_0.distcp").stat().st_size
    files = {"__0_0.distcp": {"bytes": size, "sha256": "0" * 64}}
    mark = {"format": "streaming-rwkv-checkpoint/1", "step": 1, "run": {}, "files": files}
    (tmp_path / "complete.json").write_text(json.dumps(mark))
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is not what was written"):
        read_model(tmp_path)


@pytest.mark.slow
def test_a_file_that_composer_wrote_is_read(random_model: Build, programs: ForkServer, tmp_path: Path) -> None:
    program = """
import sys, torch, warnings
from composer import Trainer
from composer.models import ComposerModel
from streaming_rwkv.model.weights import read_model

warnings.simplefilter("ignore")

class Network(ComposerModel):
    def __init__(self, network):
        super().__init__()
        self.network = network
    def forward(self, batch):
        return self.network(batch, targets=batch)
    def loss(self, outputs, batch):
        return outputs.mean()

network = read_model(sys.argv[1])
data = torch.utils.data.DataLoader(torch.zeros(4, 8, dtype=torch.int64), batch_size=2)
Trainer(model=Network(network), train_dataloader=data, max_duration="2ba", save_folder=sys.argv[2], device="cpu",
        save_filename="model.pt", optimizers=torch.optim.AdamW(network.parameters()), progress_bar=False).fit()
torch.save(network.state_dict(), sys.argv[2] + "/expected.pth")
"""
    write_pth(model_state(random_model()), tmp_path / "start.pth")
    (tmp_path / "program.py").write_text(program)
    arguments = [sys.executable, tmp_path / "program.py", tmp_path / "start.pth", tmp_path / "run"]
    programs.run(arguments, check=True, timeout=200)
    written, expected = read_state(tmp_path / "run" / "model.pt"), read_state(tmp_path / "run" / "expected.pth")
    assert same(written, expected)
    assert not same(written, model_state(random_model()))


# Refusals


class Payload:
    """Unpickled by Python's own means, it creates the file at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pth_is_refused_and_runs_nothing(random_model: Build, tmp_path: Path) -> None:
    torch.save({**model_state(random_model()), "extra": Payload(tmp_path / "owned")}, tmp_path / "evil.pth")
    with pytest.raises(
        CheckpointError, match=r"evil\.pth: refused, since .* would run code .*it asks for posix\.mkdir"
    ):
        read_model(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the file is armed
    assert (tmp_path / "owned").exists()


def test_a_malicious_index_is_refused_and_runs_nothing(random_model: Build, tmp_path: Path) -> None:
    save_sharded(training_state(random_model(), ""), tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(CheckpointError, match=r"refused.*it asks for (posix|nt)\.mkdir"):
        read_model(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_malicious_composer_file_is_refused_and_runs_nothing(random_model: Build, tmp_path: Path) -> None:
    state = {"state": training_state(random_model(), ""), "rng": Payload(tmp_path / "owned")}
    torch.save(state, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="refused"):
        read_model(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"\x95\x01garbage", b"\x80\x02cos\nsystem\n.", bytes(range(256))])
def test_torchs_advice_to_run_the_code_of_a_file_is_left_out(content: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(io.BytesIO(content), weights_only=True)
    assert "weights_only" in str(caught.value)
    assert "weights_only" not in without_advice(str(caught.value))


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("x.pth", b"version https://git-lfs.github.com/spec/v1\noid", "it begins with 'version https://git-lfs"),
        ("x.pth", b"<!DOCTYPE html>", "not a torch file: it begins with '<!DOCTYPE html>'"),
        ("x.pth", b"", "not a torch file: it begins with ''"),
        ("x.pth", b"\x80\x02h\x05.", "damaged or no checkpoint"),
        ("x.pth", b"\x80\x02garbage", r"damaged or no checkpoint \("),
        ("x.gguf", b"GGUF\3\0\0\0", "is a GGUF file, which llama.cpp reads, and .* export. only writes; give the .pth"),
        ("x.safetensors", b"\x10\0\0\0\0\0\0\0{}", "damaged or no checkpoint"),
    ],
)
def test_another_kind_of_file_is_not_reported_as_an_attack(
    name: str, content: bytes, error: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=error) as caught:
        read_model(tmp_path / name)
    assert "weights_only" not in str(caught.value)


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def pickled_call(function: Any, *arguments: Any) -> bytes:
    return pickle.dumps(Call(function, *arguments), protocol=2)


RECONSTRUCT = np.empty(0).__reduce__()[0]
BYTEARRAY = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R."  # of 8 GiB


@pytest.mark.parametrize(
    ("pickled", "error"),
    [
        (BYTEARRAY, r"damaged or no checkpoint \(it asks for builtins.bytearray, which is in no weights\)"),
        (
            pickled_call(np.ndarray, (1 << 40,), "O"),
            r"damaged or no checkpoint \(its pickle calls numpy.ndarray, as no file",
        ),
        (
            pickled_call(RECONSTRUCT, np.ndarray, (1 << 40,), b"b"),
            r"damaged or no checkpoint \(its pickle has an array that",
        ),
        (b"\x80\x02}r\0", "damaged or no checkpoint"),  # ends within a number
        (b"\x80\x02cdatetime\ntimedelta\n\x8a\x09\0\0\0\0\0\0\0\0\x01\x85R.", "damaged or no checkpoint"),  # 2**64 days
        (b"\x80\x02NQ.", "damaged or no checkpoint"),  # storage without a description
    ],
    ids=["bytearray", "array", "array by NumPy's function", "cut off", "overflow", "assertion"],
)
def test_a_pickle_that_cannot_be_meant_is_damaged(pickled: bytes, error: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"x/{name}", content)
    with pytest.raises(CheckpointError, match=rf"x\.pth: {error}"):
        read_model(tmp_path / "x.pth")


def test_an_archive_without_checksums_is_read(random_model: Build, tmp_path: Path) -> None:
    state = model_state(random_model())
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(state, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    found = read_state(tmp_path / "x.pth")
    assert all(torch.equal(found[name], weight) for name, weight in state.items())


def test_a_bytearray_is_refused_in_the_format_without_an_archive(tmp_path: Path) -> None:
    torch.save({"emb.weight": torch.zeros(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pth").read_bytes()
    stream = io.BytesIO(content)
    for _ in range(3):  # magic number, version, machine
        list(pickletools.genops(stream))
    (tmp_path / "x.pth").write_bytes(content[: stream.tell()] + BYTEARRAY + content[stream.tell() :])
    with pytest.raises(CheckpointError, match=r"it asks for builtins\.bytearray"):
        read_model(tmp_path / "x.pth")


def test_a_compressed_archive_is_not_expanded(random_model: Build, tmp_path: Path) -> None:
    write_pth(model_state(random_model()), tmp_path / "model.pth")
    with (
        zipfile.ZipFile(tmp_path / "model.pth") as stored,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for entry in stored.infolist():
            archive.writestr(entry.filename, stored.read(entry))
    with pytest.raises(CheckpointError, match=r"small\.pth: .* in it is compressed, which torch never does"):
        read_model(tmp_path / "small.pth")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_of_files_with_another_content_is_refused(
    index: dict[str, Any], random_model: Build, tmp_path: Path
) -> None:
    write_huggingface(model_state(random_model()), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: has no weight_map of files"):
        read_model(tmp_path)


def test_a_truncated_file_is_named(random_model: Build, tmp_path: Path) -> None:
    write_pth(model_state(random_model()), tmp_path / "model.pth")
    content = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.pth: damaged or no checkpoint"):
        read_model(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda state: state.pop("blocks.1.att.k_a"), r"x\.pth: has no blocks\.1\.att\.k_a \(1 parameters missing, 0"),
        (
            lambda state: state.update(wte=torch.ones(1)),
            r"x\.pth: has wte, which this model does not have \(0 .* 1 unknown",
        ),
        (lambda state: state.update({"head.weight": torch.ones(97, 64)}), r"head\.weight is \(97, 64\), this model's"),
        (lambda state: state.pop("emb.weight"), r"not an RWKV-7 model, it has no emb\.weight; found blocks"),
        (lambda state: state.update({"blocks.0.att.r_k": torch.ones(4)}), r"r_k is \(4,\), expected 2 dimensions"),
        (lambda state: state.update(epoch=3), r"x\.pth: 'epoch' is no tensor"),
    ],
)
def test_another_model_than_rwkv7_is_refused(
    change: Callable[[dict[str, Any]], object], error: str, random_model: Build, tmp_path: Path
) -> None:
    state: dict[str, Any] = model_state(random_model())
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=error):
        read_model(tmp_path / "x.pth")


def test_a_checkpoint_of_another_depth_is_refused(random_model: Build) -> None:
    target = RWKV7(RWKV7Config(vocab_size=97, hidden_size=128, num_layers=2))
    with pytest.raises(CheckpointError, match=r"a: has blocks\.2\..*found a model of 3 layers, this one has 2"):
        load_state(target, model_state(random_model()), where="a")


def test_a_model_without_tokens_is_refused_in_one_line(random_model: Build, tmp_path: Path) -> None:
    state = model_state(random_model())
    torch.save(state | {"emb.weight": state["emb.weight"][:0]}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"^.*x\.pth: not an RWKV-7 model: vocab_size: found 0[^\n]*$"):
        read_model(tmp_path / "x.pth")


def test_a_missing_or_empty_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rwkv: no such file; give a \.pth"):
        read_model(tmp_path / "rwkv")
    with pytest.raises(CheckpointError, match="no checkpoint in this folder; expected a Hugging Face folder"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'rwkv7'"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06, BlinkDL's RWKV-7 has 1e-05"),
        ({"attn": {"layers": [1]}}, r"attn is {'layers': \[1\]}, BlinkDL's RWKV-7 has None"),
        ({"head_dim": "64"}, "head_dim is '64', expected a number"),
        ({"head_dim": 32}, "head_dim: found 32; Hugging Face implementations agree with BlinkDL's for head size 64"),
    ],
)
def test_a_huggingface_model_that_computes_something_else_is_refused(
    change: dict[str, Any], error: str, random_model: Build, tmp_path: Path
) -> None:
    write_huggingface(model_state(random_model()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=error):
        read_model(tmp_path)


def test_a_weight_file_outside_the_folder_is_not_read(random_model: Build, tmp_path: Path) -> None:
    write_huggingface(model_state(random_model()), tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"emb.weight": "../model.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"has no file '\.\./model\.safetensors'"):
        read_model(tmp_path / "hf")


def test_another_head_size_is_not_exported_to_huggingface(random_model: Build, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="head size: found 32; Hugging Face implementations agree"):
        write_huggingface(model_state(random_model(head_size=32)), tmp_path / "hf")


def test_a_pipe_is_not_called_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth: found a named pipe, expected a regular file; restore it"):
        read_model(tmp_path / "model.pth")


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_configuration_without_content_has_a_remedy(content: str, random_model: Build, tmp_path: Path) -> None:
    write_huggingface(model_state(random_model()), tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: .*; copy it again from its source"):
        read_model(tmp_path)


@pytest.mark.parametrize("kind", ["pth", "safetensors", "config.json", "sharded"])
def test_a_file_without_the_right_to_read_it_is_not_called_damaged(
    kind: str, random_model: Build, public_folder: Path
) -> None:
    state, path = model_state(random_model()), public_folder / "model"
    match kind:
        case "pth":
            write_pth(state, path)
            unreadable = path
        case "sharded":
            save_sharded(training_state(random_model(), ""), path)
            unreadable = path / "__0_0.distcp"
        case _:
            write_huggingface(state, path)
            unreadable = path / ("config.json" if kind == "config.json" else "model.safetensors")
    unreadable.chmod(0)
    with (
        pytest.raises(CheckpointError) as caught,
        without_rights(),
    ):
        read_model(path)
    assert str(caught.value) == f"{unreadable}: cannot be read (Permission denied); check its permissions"
