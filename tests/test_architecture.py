"""Directions of imports, names of files, sizes of functions, and questions that one module answers for all."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fork_server import ForkServer

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "streaming", "composer", "transformers", "torchmetrics", "boto3", "ray")
SMALLEST = [
    "model.hidden_size=64",
    "model.num_layers=1",
    "data.batch_packs=4",
    "data.workers=0",
    "log.tensorboard=false",
]
OURS = sorted(path for folder in ("prep", "streaming_rwkv") for path in (ROOT / folder).rglob("*.py"))


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    program = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "prep.__main__", "prep.build", "prep.config", "streaming_rwkv.config", "streaming_rwkv.shards",
        "streaming_rwkv.tokenizer", "streaming_rwkv.processes", "streaming_rwkv.train.__main__",
    ],
)  # fmt: skip
def test_preparation_and_the_command_line_start_without_the_training_libraries(module: str) -> None:
    assert loaded_by(f"import {module}") & set(HEAVY) == set()


def test_the_check_above_can_fail() -> None:
    assert "torch" in loaded_by("import streaming_rwkv.ops")


def test_the_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of_modules() -> dict[str, set[str]]:
    """The project's modules that each module imports, also within functions and for types alone."""
    sources = {module_name(path): path for path in OURS}
    found: dict[str, set[str]] = {}
    for module, path in sources.items():
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom | ast.Import)
        ]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in sources else node.module for name in below}
        found[module] = (names & set(sources)) - {module}
    return found


DEEPEST_IMPORTS_OF_PREP = 7  # imports that follow one another


def test_imports_have_no_cycle_and_those_of_prep_are_shallow() -> None:
    imports = imports_of_modules()
    depths: dict[str, int] = {}

    def depth(module: str, importers: tuple[str, ...]) -> int:
        assert module not in importers, " → ".join((*importers, module))
        if module not in depths:
            below = {name: depth(name, (*importers, module)) for name in sorted(imports[module])}
            package = module.partition(".")[0]
            depths[module] = max((1 + steps for name, steps in below.items() if name.startswith(package)), default=0)
        return depths[module]

    for module in imports:
        depth(module, ())
    assert max(value for module, value in depths.items() if module.startswith("prep")) <= DEEPEST_IMPORTS_OF_PREP


def test_kernels_is_a_folder_of_sources_not_a_package() -> None:
    """Hugging Face's package `kernels` has that import name."""
    assert not list((ROOT / "kernels").rglob("*.py"))


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_module_has_a_name_of_the_standard_library() -> None:
    names = {path.stem for path in OURS} - {"__init__", "__main__"}
    names |= {path.stem for path in ROOT.glob("*.py")} | {"prep", "streaming_rwkv"}
    assert names & set(sys.stdlib_module_names) == set()


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT)) for path in OURS if path.stat().st_size and not path.read_text().startswith('"""')
    ]
    assert silent == []


LONGEST_FUNCTION = 60  # lines, its docstring included
LONGER_FUNCTIONS = {
    "streaming_rwkv/ops/layer/projections.py: mixed_projections": "its docstring states the op's equations"
}
LONGEST_TRAINING_MODULE = 400


def test_functions_fit_on_a_screen() -> None:
    longer = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in OURS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    }
    assert longer == set(LONGER_FUNCTIONS)


def test_modules_of_training_have_one_responsibility() -> None:
    modules = [path for path in OURS if path.is_relative_to(ROOT / "streaming_rwkv" / "train")]
    assert modules
    assert [path.name for path in modules if path.read_text().count("\n") > LONGEST_TRAINING_MODULE] == []


@pytest.mark.parametrize(
    ("pattern", "modules"),
    [
        (r"get_rank|LOCAL_RANK|(?<!ray\.)is_initialized", {"streaming_rwkv/distributed.py"}),
        (r"os\.replace|os\.fsync|fcntl\.flock", {"streaming_rwkv/filesystem.py"}),
        # A folder is a checkpoint by its name: these modules own the names.
        (
            r"\.rename\(",
            {
                "streaming_rwkv/filesystem.py",
                "streaming_rwkv/train/checkpoints/local.py",
                "streaming_rwkv/train/checkpoints/restore.py",
            },
        ),
        (r"unittest", set()),
        (r"(?m)^ *(from|import) streaming\b(?!\.base\.util)", {"streaming_rwkv/data/streaming_compat.py"}),
    ],
)
def test_one_module_answers_for_all(pattern: str, modules: set[str]) -> None:
    found = {str(path.relative_to(ROOT)) for path in OURS if re.search(pattern, path.read_text())}
    assert found == modules


def test_every_package_is_installed() -> None:
    """An editable install finds packages that an install from the list would lack."""
    block = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    listed = {name for name in re.findall(r'"(.*?)"', block[1]) if not name.startswith("streaming_rwkv.kernels")}
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for package in ("prep", "streaming_rwkv")
        for file in (ROOT / package).rglob("__init__.py")
    }
    assert listed == found


def check_walk(walk: str) -> None:
    stops, returns = map(int, re.findall(r"(\d+) stops, (\d+) returns", walk)[0])
    assert stops <= 25
    assert returns <= 5


def test_a_recipe_takes_a_short_way(tmp_path: Path, programs: ForkServer) -> None:
    (tmp_path / "web.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    values = {"out": "data", "tokenizer": "rwkv-world", "sources": {"web": {"paths": "web.jsonl"}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-m", "tools.config_walk", "prep", "build", "recipe.yaml"]
    for workers in (1, 2):
        settings = [f"workers={workers}", f"out=data{workers}"]
        walk = programs.run([*command, *settings], cwd=tmp_path, timeout=300, check=True).stdout
        assert "prep/build.py: build\n" in walk
        assert ("prep/inputs/readers.py: read_unit\n" in walk) == (workers == 1)
        check_walk(walk)


@pytest.mark.slow
def test_the_configuration_of_a_run_takes_a_short_way(
    write_data_set: Callable[..., Path], tmp_path: Path, programs: ForkServer
) -> None:
    data = write_data_set(tmp_path / "data", {("web", 1, 16): 24})
    settings = ["yamls/tiny_cpu.yaml", f"data.path={data}", f"save_folder={tmp_path / 'run'}", *SMALLEST]
    command = [sys.executable, "-m", "tools.config_walk", "streaming_rwkv.train", *settings]
    walk = programs.run(command, cwd=ROOT, timeout=300, check=True).stdout
    assert "streaming_rwkv/train/prepare.py: prepare\n" in walk
    check_walk(walk)
