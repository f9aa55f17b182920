"""Read and write weights: BlinkDL's `.pth`, Hugging Face folders, and training checkpoints.

Every reader returns a *state*: a dict of CPU tensors under the model's own names (BlinkDL's), from which the shape of
the model is inferred. No reader runs code from a file: only tensors and plain values are read from pickles.

    format               description
    BlinkDL's            one file; a flat dict, usually bfloat16; layer 0 may or may not have att.v0, v1, v2
                         (.pth, .safetensors, .st; also behind prefixes, or under `state_dict`, `model`, `module`)
    Hugging Face's       a folder; config.json, *.safetensors; names of fla and rwkv7_hf, or of transformers' own model
    a training run's     a folder of shards with a `.metadata`: one of the run's checkpoints
    Composer's           one file (state → model → …), or a folder of shards
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from streaming_rwkv.errors import UserError
from streaming_rwkv.filesystem import atomic_file, open_regular_file, read_regular_file, write_atomically
from streaming_rwkv.limits import explain_limit, limit_of
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.huggingface_names import (
    FLAT,
    LAYER_NORM_EPS,
    check_group_norm,
    from_huggingface_name,
    is_transposed,
    to_huggingface_name,
)
from streaming_rwkv.model.marked_files import CheckpointError as CheckpointError
from streaming_rwkv.model.marked_files import unreadable
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.sharded import read_sharded, without_advice
from streaming_rwkv.model.sharded_index import INDEX_NAME
from streaming_rwkv.model.state import (
    UNUSED,
    State,
    check_fits,
    converted_to,
    expected_shapes,
    infer_config,
    load_state,
    some_names,
)
from streaming_rwkv.model.torch_files import SAFE_GLOBALS, WEIGHT_DTYPES, check_torch_file
from streaming_rwkv.model.transformers_layout import (
    from_transformers_name,
    is_transformers_name,
    to_transformers,
    transformers_values,
)
from streaming_rwkv.shards import LARGEST_FILE_BYTES
from streaming_rwkv.version import PROGRAM

Layout = Literal["fla", "transformers"]

_VECTOR = re.compile(r"blocks\.\d+\.(att\.(x_[rwkvag]|[wav]0|k_[ka])|ffn\.x_k)")
_CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_SAFETENSORS_INDEX = "model.safetensors.index.json"
_SAFETENSORS_SUFFIXES = (".safetensors", ".st")
_WRAPPERS = ("state", "state_dict", "model", "module")  # of Composer, Lightning, plain trainers, DeepSpeed
_MOST_WRAPPERS = 4
# Wrappers add these parts anywhere in a name: torch.compile, FSDP and activation checkpointing.
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FREE_BYTES = 1 << 20
_PROBED_BYTES = 1 << 20  # more than a full disk or a limit of file sizes leaves after a failed write
_TORCH_FILES = (b"PK", b"\x80")  # a zip archive, or a pickle of the legacy format


def read_model(path: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> RWKV7:
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
    check_fits(state, expected_shapes(config), where=str(path))  # before a model of that size is built
    with torch.device("meta"):
        model = RWKV7(config.model_copy(update=options))
    model = model.to(dtype).to_empty(device="cpu")
    load_state(model, state, where=str(path))
    return model


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


def is_of_rwkv7(folder: Path) -> bool:
    """Return whether a folder's config.json is that of an RWKV-7 model."""
    try:
        return _read_json(folder / _CONFIG_NAME).get("model_type") == "rwkv7"
    except CheckpointError:
        return False


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
    if not path.exists():
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
    if "rwkv7.emb.weight" in content:
        content = {from_transformers_name(name): value for name, value in content.items()}
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
        if (
            value.is_nested
            or value.layout != torch.strided
            or value.device.type != "cpu"
            or value.dtype not in WEIGHT_DTYPES
        ):
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
    if beginning.startswith(b"GGUF"):
        raise CheckpointError(
            f"{path}: is a GGUF file, which llama.cpp reads, and `{PROGRAM} export` only writes; give the .pth or the "
            "folder that it was made from"
        )
    if not beginning.startswith(_TORCH_FILES):
        what = beginning.decode(errors="replace").partition("\n")[0]
        raise ValueError(f"not a torch file: it begins with {what!r}")
    with open(path, "rb") as file:
        is_archive = check_torch_file(file)
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        # Files of the legacy format, without zip, can be read but not mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def _guarded(read: Callable[[Path], Any], path: Path) -> Any:
    """Run a reader, and turn its errors into ones that name the file."""
    if not path.is_dir():
        _check_readable(path)
    try:
        return read(path)
    except pickle.UnpicklingError as error:
        # torch's text advises to disable the protection; only the global or the problem that it names is kept.
        asks_for = re.search(r"(?:it asks for|GLOBAL) ([\w.]+)", str(error))
        if asks_for is None:
            raise _damaged(path, without_advice(str(error))) from None
        raise CheckpointError(
            f"{path}: refused, since reading it whole would run code that it brings (it asks for {asks_for[1]}). Only "
            "weights are read here; to make one, where you trust the file: torch.save(model.state_dict(), …)"
        ) from None
    except CheckpointError:  # of the mark of a run's checkpoint
        raise
    except PermissionError as error:
        raise unreadable(path, error) from None
    except _DAMAGED as error:
        raise _damaged(path, explain_limit(error) or str(error)) from error


def _check_readable(file: Path) -> None:
    """Refuse a pipe, a device and a file without permission to read it, which torch and safetensors call damaged.

    Raises:
        CheckpointError: names the kind that was found, or the reason.
    """
    try:
        open_regular_file(file).close()
    except OSError as error:
        raise unreadable(file, error) from None
    except UserError as error:
        raise CheckpointError(str(error)) from None


# The second line is torch's and pickle's, of bytes that mean nothing.
_DAMAGED = (
    RuntimeError, EOFError, OSError, ValueError, safetensors.SafetensorError,
    LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, AssertionError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip


def _damaged(path: Path, reason: str) -> CheckpointError:
    reason = reason.strip().partition("\n")[0]
    return CheckpointError(f"{path}: damaged or no checkpoint ({reason}); copy it again from its source")


def _of_model(weights: Mapping[str, Any], *, where: Path) -> State:
    """Weights under BlinkDL's names: what trains or wraps the network puts a prefix before them, such as `module.`."""
    weights = {_WRAPPED.sub("", name): value for name, value in weights.items()}
    prefixes = [name.removesuffix("emb.weight") for name in weights if name.endswith("emb.weight")]
    if not prefixes:
        raise CheckpointError(f"{where}: not an RWKV-7 model, it has no emb.weight; found {some_names(weights)}")
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{where}: not an RWKV-7 model, it has {len(prefixes)} weights called emb.weight, expected one; found "
            f"{some_names(dict.fromkeys(prefix + 'emb.weight' for prefix in prefixes))}"
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
        "norm_eps": LAYER_NORM_EPS,
        "norm_bias": True,
        "norm_first": True,
        "hidden_act": "sqrelu",
        "attn": None,
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{folder}/{_CONFIG_NAME}: {key} is {config[key]!r}, BlinkDL's RWKV-7 has {value!r}")
    check_group_norm(head_size, where=f"{folder}/{_CONFIG_NAME}: head_dim")
    if (folder / _SAFETENSORS_INDEX).is_file():
        weight_map = _read_json(folder / _SAFETENSORS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{folder / _SAFETENSORS_INDEX}: has no weight_map of files; copy it again")
        files = sorted(set(weight_map.values()))
    else:
        files = [WEIGHTS_NAME]
    state: State = {}
    layouts: dict[str, str] = {}  # a name that shows each
    for file in files:
        is_plain = Path(file).name == file and len(file.encode(errors="replace")) <= 255
        if not is_plain or not (folder / file).exists():
            raise CheckpointError(
                f"{folder}: has no file {file[:80]!r}; weights as safetensors are needed, copy them again"
            )
        for name, value in _guarded(safetensors.torch.load_file, folder / file).items():
            own_name = from_huggingface_name(name)
            if is_transformers_name(name):
                layouts.setdefault("transformers", name)
                state[from_transformers_name(name)] = value
            elif own_name is not None:
                layouts.setdefault("fla", name)
                state[own_name] = value.T if is_transposed(name) else value
            else:
                raise CheckpointError(
                    f"{folder}/{file}: unknown parameter {name}; expected the names of fla (model.layers.0.attn.…) or "
                    "of transformers (rwkv7.blocks.0.att.…)"
                )
    if len(layouts) > 1:
        raise CheckpointError(
            f"{folder}: has names of two layouts, transformers' {layouts['transformers']} and fla's {layouts['fla']}; "
            "it was put together from two models: copy it again from its source"
        )
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
        values = json.loads(read_regular_file(path, most=LARGEST_FILE_BYTES))
    except UserError as error:  # of a file that cannot be read at all
        raise CheckpointError(str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); copy it again from its source") from None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path}: found a {type(values).__name__}, expected a mapping; copy it again from its source"
        )
    return values


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
    complete = {name: converted_to(name, value, dtype, where=str(path)).contiguous() for name, value in state.items()}
    width, rank = config.hidden_size, config.v_rank
    for name, shape in {"v0": (1, 1, width), "v1": (width, rank), "v2": (rank, width)}.items():
        complete.setdefault(f"blocks.0.att.{name}", torch.zeros(shape, dtype=dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, _explained_saving(path, temporary):
        # A parameter of a mapped file is a view of the whole file: without a copy, all of it would be stored.
        torch.save({name: value.clone() for name, value in complete.items()}, temporary)


@contextlib.contextmanager
def _explained_saving(path: Path, temporary: Path) -> Iterator[None]:
    """Say why torch or safetensors cannot write a file: their errors are not those of the file system.

    Args:
        temporary: the file that is written.
    """
    try:
        yield
    except (RuntimeError, safetensors.SafetensorError) as error:
        problem = _find_write_problem(temporary)
        cause = problem.strerror if problem else "it was cut short"
        remedy = (problem and limit_of(problem)) or "make space, or write to another place"
        raise CheckpointError(f"{path}: cannot be written ({cause}); {remedy}") from error


def _find_write_problem(file: Path) -> OSError | None:
    """Return the error of appending to a file, or None."""
    try:
        with open(file, "ab") as appended:
            appended.write(bytes(_PROBED_BYTES))
    except OSError as error:
        return error
    return None


def write_huggingface(
    state: Mapping[str, Tensor],
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bos_id: int | None = None,
    eos_id: int | None = None,
    layout: Layout = "fla",
    auto_map: Mapping[str, str] | None = None,
) -> None:
    """Write a folder in Hugging Face's format: model.safetensors, then config.json.

    The tokenizer's files are not written: `tokenizer.save(folder)` puts them beside these.

    Args:
        layout: `fla`, which `fla`, `rwkv7_hf` and llama.cpp's converter load, or that of transformers' own model.
        auto_map: in the layout `fla`, the classes in the folder's own code that transformers loads the model with.
    Raises:
        CheckpointError: a head size for which those implementations compute something else, or a value that is not
            finite in `dtype`.
    """
    folder = Path(folder)
    config = infer_config(state, where=str(folder))
    check_group_norm(config.head_size, where=f"{folder}: head size")
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "transformers":
        converted = {name: converted_to(name, value, dtype, where=str(folder)) for name, value in state.items()}
        values = transformers_values(config, norm_eps=LAYER_NORM_EPS, dtype=dtype, bos_id=bos_id, eos_id=eos_id)
        _write_folder(folder, to_transformers(converted, config, dtype=dtype), values)
        return
    weights = {}
    for name, value in state.items():
        if UNUSED.fullmatch(name):
            continue
        their_name = to_huggingface_name(name)
        value = converted_to(name, value, dtype, where=str(folder))
        value = value.T if is_transposed(their_name) else value
        value = value.flatten() if their_name.endswith(FLAT) else value
        weights[their_name] = value.contiguous().clone()
    values = _fla_values(config, dtype=dtype, bos_id=bos_id, eos_id=eos_id)
    _write_folder(folder, weights, values | ({"auto_map": dict(auto_map)} if auto_map else {}))


def _write_folder(folder: Path, weights: dict[str, Tensor], values: dict[str, Any]) -> None:
    with atomic_file(folder / WEIGHTS_NAME) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode)  # safetensors replaces the file, with a mode of 0600
        with _explained_saving(folder / WEIGHTS_NAME, temporary):
            safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
    write_atomically(folder / _CONFIG_NAME, (json.dumps(values, indent=2) + "\n").encode())


def _fla_values(config: RWKV7Config, *, dtype: torch.dtype, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """Return the content of config.json in fla's layout."""
    return {
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
        "norm_eps": LAYER_NORM_EPS,
        "tie_word_embeddings": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
