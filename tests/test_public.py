"""The public names: the same for Python and for type checkers, imported when used, whatever else is imported first."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import prep
import streaming_rwkv
from streaming_rwkv import UserError, load_model, load_tokenizer, read_manifest

ROOT = Path(__file__).parents[1]
PACKAGES = [prep, streaming_rwkv]
WITHOUT_TORCH = """
import sys
for name in ("torch", "streaming", "composer", "transformers"):
    sys.modules[name] = None  # as if it were not installed
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_type_checkers_and_python_see_the_same_names(package) -> None:
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert imported == package.__dict__["_homes"]
    assert sorted(imported) == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for name, module in imported.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_types_are_shipped(package) -> None:
    assert (Path(package.__file__).parent / "py.typed").is_file()
    assert f'"{package.__name__}" = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()


def test_all_of_prep_works_without_torch() -> None:
    run(WITHOUT_TORCH + "from prep import *\nassert PrepConfig and callable(build)")


def test_the_package_and_its_contract_work_without_torch_and_the_rest_names_the_command_that_installs_it() -> None:
    program = """
import streaming_rwkv
from streaming_rwkv import MixtureConfig, RWKV7Config, load_tokenizer, read_manifest
try:
    streaming_rwkv.wkv7
except ImportError as error:
    print(error)
"""
    assert run(WITHOUT_TORCH + program).strip() == (
        "streaming_rwkv.wkv7 needs the package torch, which is not installed; run `pip install '.[train]'` in a clone "
        "of streaming-rwkv"
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'streaming_rwkv' has no attribute 'RWKV8'$"):
        streaming_rwkv.RWKV8  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(("package", "name"), [("prep", "build"), ("streaming_rwkv", "generate")])
@pytest.mark.parametrize("module_first", [True, False])
def test_a_function_is_not_replaced_by_the_module_of_its_name(
    package: str, name: str, module_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = importlib.import_module(package)
    for known in (vars(parent), sys.modules):  # as in a new process
        key = name if known is not sys.modules else f"{package}.{name}"
        if key in known:
            monkeypatch.delitem(known, key)
    if module_first:
        importlib.import_module(f"{package}.{name}")
    function = getattr(parent, name)
    module = importlib.import_module(f"{package}.{name}")
    assert callable(function)
    assert getattr(parent, name) is function
    assert sys.modules[f"{package}.{name}"] is module
    assert module.__name__ == f"{package}.{name}"


def test_the_command_of_that_name_still_runs(programs) -> None:
    done = programs.run([sys.executable, "-m", "streaming_rwkv.generate", "--help"], timeout=300)
    assert done.returncode == 0
    assert "usage: python -m streaming_rwkv.generate" in done.stdout


@pytest.mark.parametrize("value", [None, 5, b"data", ["data"], "x" * 5000])
@pytest.mark.parametrize("call", [load_model, load_tokenizer, read_manifest, prep.verify, prep.build])
def test_an_argument_of_another_type_is_an_error_of_the_user(call: Any, value: object) -> None:
    with pytest.raises(UserError, match="found"):
        call(value)
