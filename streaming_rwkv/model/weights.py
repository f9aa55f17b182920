"""Read and write weights: BlinkDL's `.pth`, Hugging Face folders, and training checkpoints.

Every reader returns a *state*: a dict of CPU tensors under the model's own names (BlinkDL's), from which the shape of
the model is inferred. No reader runs code from a file: only tensors and plain values are read from pickles.

    format               description
    BlinkDL's            one file; a flat dict, usually bfloat16; layer 0 may or may not have att.v0, v1, v2
                         (.pth, .safetensors, .st; also behind prefixes, or under `state_dict`, `model`, `module`)
    Hugging Face's       a folder; config.json, *.safetensors; names of fla and rwkv7_hf
    a training run's     a folder of shards with a `.metadata`: one of the run's checkpoints
    Composer's           one file (state → model → …), or a folder of shards
"""

from __future__ import annotations

import json
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from streaming_rwkv.filesystem import atomic_file
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.marked_files import CheckpointError as CheckpointError
from streaming_rwkv.model.rwkv7 import GROUP_NORM_EPS, RWKV7
from streaming_rwkv.model.sharded import INDEX_NAME, SAFE_GLOBALS, read_sharded

State = dict[str, Tensor]

_VECTOR = re.compile(r"blocks\.\d+\.(att\.(x_[rwkvag]|[wav]0|k_[ka])|ffn\.x_k)")
_UNUSED = re.compile(r"blocks\.0\.att\.v[012]")
_CONFIG_NAME = "config.json"
_SAFETENSORS_NAME = "model.safetensors"
_SAFETENSORS_INDEX = "model.safetensors.index.json"
_SAFETENSORS_SUFFIXES = (".safetensors", ".st")
_WRAPPERS = ("state", "state_dict", "model", "module")  # of Composer, Lightning, plain trainers, DeepSpeed
_MOST_WRAPPERS = 4
# Wrappers add these parts anywhere in a name: torch.compile, FSDP and activation checkpointing.
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FREE_BYTES = 1 << 20
_TORCH_FILES = (b"PK", b"\x80")  # a zip archive, or a pickle of the legacy format
_LAYER_NORM_EPS = 1e-5  # torch's default, used by every RWKV model


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> RWKV7:
    """Return the model of a checkpoint of any known format, on the CPU.

    Args:
        path: a `.pth`, a Composer `.pt`, a Hugging Face folder, or a training run's checkpoint.
        dtype: of the parameters.
        options: fields of `RWKV7Config` that weights do not determine: activation_checkpointing, loss_chunk_tokens.
    Raises:
        CheckpointError: see `read_state` and `infer_config`.
    """
    state = read_state(path)
    config = infer_config(state, where=str(path))
    _check_fits(state, _expected_shapes(config), where=str(path))  # before a model of that size is built
    with torch.device("meta"):
        model = RWKV7(config.model_copy(update=options))
    model = model.to(dtype).to_empty(device="cpu")
    load_state(model, state, where=str(path))
    return model


def _expected_shapes(config: RWKV7Config) -> dict[str, torch.Size]:
    """Return each parameter's shape, from a model of two layers: all layers after the first have the same shapes."""
    with torch.device("meta"):
        small = RWKV7(config.model_copy(update={"num_layers": min(2, config.num_layers)}))
    shapes = {name: parameter.shape for name, parameter in small.named_parameters()}
    second = {name.split(".", 2)[2]: shape for name, shape in shapes.items() if name.startswith("blocks.1.")}
    for layer in range(2, config.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in second.items()}
    return shapes


@torch.no_grad()
def load_state(model: RWKV7, state: Mapping[str, Tensor], *, where: str) -> None:
    """Copy `state` into `model`, in place, rounding to its type. The model is on the CPU and not sharded yet.

    Raises:
        CheckpointError: a parameter is missing, unknown, of another shape, or not finite in the state or the model.
    """
    parameters = dict(model.named_parameters())
    _check_fits(state, {name: parameter.shape for name, parameter in parameters.items()}, where=where)
    for name, parameter in parameters.items():
        parameter.copy_(state[name])
        _check_finite(parameter, state[name], where=f"{where}: {name}")


def _check_fits(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, where: str) -> None:
    unknown = sorted(name for name in state if name not in shapes and not _UNUSED.fullmatch(name))
    missing = sorted(name for name in shapes if name not in state)
    if unknown or missing:
        problem = f"has no {missing[0]}" if missing else f"has {unknown[0]}, which this model does not have"
        raise CheckpointError(
            f"{where}: {problem} ({len(missing)} parameters missing, {len(unknown)} unknown); found a model of "
            f"{len(_layers(state))} layers, this one has {len(_layers(shapes))}"
        )
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} is {tuple(state[name].shape)}, this model's is {tuple(shape)}; give the model "
                "the checkpoint's shape, or leave the shape out where it is inferred"
            )


def _is_finite(value: Tensor) -> bool:
    # The extremes are NaN if any element is; a large matrix is not copied.
    return not value.numel() or all(bool(extreme.isfinite()) for extreme in value.aminmax())


def _check_finite(value: Tensor, source: Tensor, *, where: str) -> None:
    """Refuse values that are not finite; `value` is `source` converted to another type."""
    if _is_finite(value):
        return
    kind = str(value.dtype).removeprefix("torch.")
    if _is_finite(source):
        raise CheckpointError(
            f"{where}: the largest of its values is {float(source.abs().max()):g}, too large for {kind}, whose largest "
            f"is {torch.finfo(value.dtype).max:g}; take bfloat16 or float32"
        )
    raise CheckpointError(
        f"{where}: has values that are not finite: the training that wrote it has diverged, or the file is damaged; "
        "take an older checkpoint, or copy it again"
    )


def _converted(name: str, value: Tensor, dtype: torch.dtype, *, where: str) -> Tensor:
    """Return a tensor on the CPU in another type. Raises `CheckpointError` if a value is not finite there."""
    converted = value.detach().to("cpu", dtype)
    _check_finite(converted, value, where=f"{where}: {name}")
    return converted


def model_state(model: RWKV7) -> State:
    """Return the state of a model that is not sharded; the tensors are its parameters, not copies."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def infer_config(state: Mapping[str, Tensor], *, where: str) -> RWKV7Config:
    """Return the shape of the model with these weights: released RWKV-7 models follow several rank formulas.

    Raises:
        CheckpointError: not an RWKV-7 model.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state:
            raise CheckpointError(f"{where}: not an RWKV-7 model, it has no {name}; found {_some_names(state)}")
        if state[name].ndim != dimensions:
            raise CheckpointError(f"{where}: {name} is {tuple(state[name].shape)}, expected {dimensions} dimensions")
        return state[name].shape

    vocab_size, hidden_size = shape("emb.weight", 2)
    layers = _layers(state)
    if layers != list(range(len(layers))):
        missing = next(number for number, layer in enumerate([*layers, -1]) if layer != number)
        raise CheckpointError(
            f"{where}: has weights of {len(layers)} layers up to blocks.{layers[-1]}, but none of blocks.{missing}; "
            "layers are numbered from 0 without a gap: copy it again from its source"
        )
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": len(layers),
        "head_size": shape("blocks.0.att.r_k", 2)[1],
        "ffn_size": shape("blocks.0.ffn.key.weight", 2)[0],
        "decay_rank": shape("blocks.0.att.w1", 2)[1],
        "a_rank": shape("blocks.0.att.a1", 2)[1],
        "gate_rank": shape("blocks.0.att.g1", 2)[1],
    }
    # Layer 0 needs no value residual, and early files have none for it.
    value_lora = "blocks.1.att.v1" if fields["num_layers"] > 1 else "blocks.0.att.v1"
    if fields["num_layers"] > 1 or value_lora in state:
        fields["v_rank"] = shape(value_lora, 2)[1]
    try:
        return RWKV7Config(**fields)
    except ValueError as error:
        raise CheckpointError(f"{where}: not an RWKV-7 model: {error}") from None


def _layers(state: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the layers that have weights, in ascending order."""
    found = (re.match(r"blocks\.(0|[1-9]\d{0,8})\.", name) for name in state)
    return sorted({int(match[1]) for match in found if match})


def _some_names(state: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, state))[:3]) or "nothing"


# Reading


def read_state(path: str | Path) -> State:
    """Return the weights of a checkpoint of any known format, memory-mapped where the format allows it.

    Raises:
        CheckpointError: no such file, a damaged file, another kind of file, a pickle with more than weights, or a
            Hugging Face model with options that BlinkDL's RWKV-7 does not have.
    """
    path = Path(path)
    state = _read(path)
    _check_storage(state, path)
    # Hugging Face folders, and some files, store (1, 1, C) vectors as (C,).
    return {name: value.view(1, 1, -1) if _VECTOR.fullmatch(name) else value for name, value in state.items()}


def is_weights_folder(path: Path) -> bool:
    """Return True for a Hugging Face folder or a sharded checkpoint."""
    return (path / _CONFIG_NAME).is_file() or (path / INDEX_NAME).is_file()


def _read(path: Path) -> State:
    if path.is_dir():
        if (path / _CONFIG_NAME).is_file():
            return _read_huggingface(path)
        if (path / INDEX_NAME).is_file():
            return _guarded(read_sharded, path)
        raise CheckpointError(
            f"{path}: no checkpoint in this folder; expected a Hugging Face folder ({_CONFIG_NAME}, *.safetensors), a "
            f"sharded checkpoint ({INDEX_NAME}, *.distcp)"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a .pth, a .pt, or a folder, with its ending")
    is_safetensors = path.suffix in _SAFETENSORS_SUFFIXES
    content = _guarded(safetensors.torch.load_file if is_safetensors else _read_torch_file, path)
    for _ in range(_MOST_WRAPPERS):
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict of weights by name")
        inner = next((key for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = content[inner]
    unexpected = [name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if unexpected:
        raise CheckpointError(
            f"{path}: {unexpected[0]!r} is no tensor; expected a flat dict of weights, as BlinkDL has"
        )
    if any(name.endswith("embeddings.weight") for name in content):
        raise CheckpointError(
            f"{path}: its weights have Hugging Face's names, and it has no configuration; give the Hugging Face folder "
            "that contains it"
        )
    return _of_model(content, where=path)


def _check_storage(state: State, path: Path) -> None:
    """Refuse a small file that claims a large model, and types that are no weights.

    Raises:
        CheckpointError: names the tensor.
    """
    for name, value in state.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in _WEIGHT_DTYPES:
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{path}: {name} is {kind} ({value.layout}, on {value.device}), expected float32, bfloat16 or float16 "
                "weights; quantized models cannot be read, take the one that they were made from"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {name} says that it has {value.numel()} values, of which it stores fewer; save the model "
                "again without expanded tensors (tensor.contiguous())"
            )
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    stored = sum(file.stat().st_size for file in files)
    size = sum(value.numel() * value.element_size() for value in state.values())
    if size > 2 * stored + _FREE_BYTES:  # embedding and head may share their storage
        raise CheckpointError(
            f"{path}: has {size} bytes of weights in {stored} bytes of files: many of them share one tensor; save the "
            "model again with a tensor for each parameter"
        )


def _read_torch_file(path: Path) -> Any:
    with open(path, "rb") as file:
        beginning = file.read(64)
    if not beginning.startswith(_TORCH_FILES):
        what = beginning.decode(errors="replace").partition("\n")[0]
        raise ValueError(f"not a torch file: it begins with {what!r}")
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        # Files of the legacy format, without zip, can be read but not mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _guarded(read: Callable[[Path], Any], path: Path) -> Any:
    """Run a reader, and turn its errors into ones that name the file."""
    try:
        return read(path)
    except pickle.UnpicklingError as error:
        # torch's text advises to disable the protection; only the global or the problem that it names is kept.
        asks_for = re.search(r"(?:it asks for|GLOBAL) ([\w.]+)", str(error))
        if asks_for is None:
            raise _damaged(path, str(error).rpartition("WeightsUnpickler error: ")[2]) from None
        raise CheckpointError(
            f"{path}: refused, since reading it whole would run code that it brings (it asks for {asks_for[1]}). Only "
            "weights are read here; to make one, where you trust the file: torch.save(model.state_dict(), …)"
        ) from None
    except _UNREADABLE as error:
        raise _damaged(path, str(error)) from error


# The second line is torch's and pickle's, of bytes that mean nothing.
_UNREADABLE = (
    RuntimeError, EOFError, OSError, ValueError, safetensors.SafetensorError,
    LookupError, TypeError, AttributeError,
)  # fmt: skip


def _damaged(path: Path, reason: str) -> CheckpointError:
    reason = reason.strip().partition("\n")[0]
    return CheckpointError(f"{path}: damaged or no checkpoint ({reason}); copy it again from its source")


def _of_model(weights: Mapping[str, Any], *, where: Path) -> State:
    """Weights under BlinkDL's names: what trains or wraps the network puts a prefix before them, such as `module.`."""
    weights = {_WRAPPED.sub("", name): value for name, value in weights.items()}
    prefixes = [name.removesuffix("emb.weight") for name in weights if name.endswith("emb.weight")]
    if not prefixes:
        raise CheckpointError(f"{where}: not an RWKV-7 model, it has no emb.weight; found {_some_names(weights)}")
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{where}: not an RWKV-7 model, it has {len(prefixes)} weights called emb.weight, expected one; found "
            f"{_some_names(dict.fromkeys(prefix + 'emb.weight' for prefix in prefixes))}"
        )
    return {name.removeprefix(prefixes[0]): value for name, value in weights.items() if name.startswith(prefixes[0])}


def _read_huggingface(folder: Path) -> State:
    """Read the weights of a Hugging Face folder, as `fla` and `rwkv7_hf` write them, in one or several files."""
    config = _read_json(folder / _CONFIG_NAME)
    if config.get("model_type") != "rwkv7":
        raise CheckpointError(f"{folder}: model_type is {config.get('model_type')!r}, expected 'rwkv7'")
    head_size = config.get("head_dim") or 64
    if not isinstance(head_size, int):
        raise CheckpointError(f"{folder}/{_CONFIG_NAME}: head_dim is {head_size!r}, expected a number")
    expected = {
        "norm_eps": _LAYER_NORM_EPS,
        "norm_bias": True,
        "norm_first": True,
        "hidden_act": "sqrelu",
        "attn": None,
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{folder}/{_CONFIG_NAME}: {key} is {config[key]!r}, BlinkDL's RWKV-7 has {value!r}")
    _check_group_norm(head_size, where=f"{folder}/{_CONFIG_NAME}: head_dim")
    if (folder / _SAFETENSORS_INDEX).is_file():
        weight_map = _read_json(folder / _SAFETENSORS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{folder / _SAFETENSORS_INDEX}: has no weight_map of files; copy it again")
        files = sorted(set(weight_map.values()))
    else:
        files = [_SAFETENSORS_NAME]
    state: State = {}
    for file in files:
        if not (folder / file).is_file() or Path(file).name != file:
            raise CheckpointError(f"{folder}: has no file {file!r}; weights as safetensors are needed, copy them again")
        for name, value in _guarded(safetensors.torch.load_file, folder / file).items():
            own_name = from_huggingface_name(name)
            if own_name is None:
                raise CheckpointError(f"{folder}/{file}: unknown parameter {name}")
            state[own_name] = value.T if _is_transposed(name) else value
    if config.get("tie_word_embeddings") and "emb.weight" in state:
        head = state.setdefault("head.weight", state["emb.weight"])
        if not torch.equal(head, state["emb.weight"]):
            raise CheckpointError(
                f"{folder}/{_CONFIG_NAME}: tie_word_embeddings is true, but lm_head.weight is not the embedding; set "
                "it to false if the head is a weight of its own, or delete lm_head.weight"
            )
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: found a {type(values).__name__}, expected a mapping")
    return values


def _check_group_norm(head_size: int, *, where: str) -> None:
    # There the GroupNorm's epsilon is head_dim · norm_eps; BlinkDL's is 64e-5 for every head size.
    if abs(head_size * _LAYER_NORM_EPS - GROUP_NORM_EPS) > 1e-9:
        raise CheckpointError(
            f"{where}: found {head_size}; Hugging Face implementations agree with BlinkDL's for head size 64 alone"
        )


# Writing


def write_pth(state: Mapping[str, Tensor], path: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write BlinkDL's format, which `rwkv`, RWKV-Runner and his trainers load.

    The file appears completely or not at all. His trainers expect `v0`, `v1` and `v2` in layer 0 too; these are never
    read, and written as zeros.

    Raises:
        CheckpointError: a value is not finite in `dtype`.
    """
    path = Path(path)
    config = infer_config(state, where=str(path))
    complete = {name: _converted(name, value, dtype, where=str(path)).contiguous() for name, value in state.items()}
    width, rank = config.hidden_size, config.v_rank
    for name, shape in {"v0": (1, 1, width), "v1": (width, rank), "v2": (rank, width)}.items():
        complete.setdefault(f"blocks.0.att.{name}", torch.zeros(shape, dtype=dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        # A parameter of a mapped file is a view of the whole file: without a copy, all of it would be stored.
        torch.save({name: value.clone() for name, value in complete.items()}, temporary)


def write_huggingface(
    state: Mapping[str, Tensor],
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> None:
    """Write a folder that `fla` and `rwkv7_hf` load: model.safetensors, then config.json.

    The tokenizer's files are not written: `tokenizer.save(folder)` puts them beside these.

    Raises:
        CheckpointError: a head size for which those implementations compute something else, or a value that is not
            finite in `dtype`.
    """
    folder = Path(folder)
    config = infer_config(state, where=str(folder))
    _check_group_norm(config.head_size, where=f"{folder}: head size")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, value in state.items():
        if _UNUSED.fullmatch(name):
            continue
        their_name = to_huggingface_name(name)
        value = _converted(name, value, dtype, where=str(folder))
        value = value.T if _is_transposed(their_name) else value
        value = value.flatten() if their_name.endswith(_FLAT) else value
        weights[their_name] = value.contiguous().clone()
    with atomic_file(folder / _SAFETENSORS_NAME) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode)  # safetensors replaces the file, with a mode of 0600
        safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
    values = {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "attn_mode": "chunk",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "head_dim": config.head_size,
        "num_heads": config.num_heads,
        "intermediate_size": config.ffn_size,
        "hidden_ratio": config.ffn_size / config.hidden_size,
        "decay_low_rank_dim": config.decay_rank,
        "a_low_rank_dim": config.a_rank,
        "v_low_rank_dim": config.v_rank,
        "gate_low_rank_dim": config.gate_rank,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": _LAYER_NORM_EPS,
        "tie_word_embeddings": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / _CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n")


# Names: ours (BlinkDL's) ↔ fla's and rwkv7_hf's

_OUTER_NAMES = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_LORA_NAMES = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}
_BLOCK_NAMES = {
    **{f"{ours}.{end}": f"{theirs}.{end}"
       for ours, theirs in {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att.ln_x": "attn.g_norm"}.items()
       for end in ("weight", "bias")},
    **{f"att.{ours}.weight": f"attn.{theirs}.weight"
       for ours, theirs in {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}.items()},
    **{f"att.{letter}{part}": f"attn.{letter}_lora.lora.{end}"
       for letter in "wavg" for part, end in _LORA_NAMES.items() if (letter, part) != ("g", "0")},
    **{f"att.{name}": f"attn.{name}" for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k")},
    **{f"ffn.{name}": f"ffn.{name}" for name in ("x_k", "key.weight", "value.weight")},
}  # fmt: skip
_FROM_OUTER = {theirs: ours for ours, theirs in _OUTER_NAMES.items()}
_FROM_BLOCK = {theirs: ours for ours, theirs in _BLOCK_NAMES.items()}
_FLAT = ("lora.2.bias", ".k_k", ".k_a", "ffn.x_k")  # (C,) there, (1, 1, C) here


def to_huggingface_name(name: str) -> str:
    """Return Hugging Face's name of a parameter: "blocks.3.att.w1" → "model.layers.3.attn.w_lora.lora.0.weight".

    Raises:
        KeyError: our models have no parameter of this name.
    """
    if not name.startswith("blocks."):
        return _OUTER_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_BLOCK_NAMES[rest]}"


def from_huggingface_name(name: str) -> str | None:
    """Invert `to_huggingface_name`; return None for a name that it never returns."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if not found:
        return _FROM_OUTER.get(name)
    rest = _FROM_BLOCK.get(found[2])
    return None if rest is None else f"blocks.{found[1]}.{rest}"


def _is_transposed(huggingface_name: str) -> bool:
    """LoRA factors multiply from the right here, and are `Linear` weights there."""
    return "_lora.lora." in huggingface_name and huggingface_name.endswith(".weight")
