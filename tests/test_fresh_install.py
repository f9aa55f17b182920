"""A checkout installed alone, with the newest and the lowest allowed requirements, each in a new environment.

These tests need the package index, as `make test` does to build its own environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

import pytest
import zstandard
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
INSTALLED = ("pyproject.toml", "README.md", "LICENSE", "train.py", "prep", "streaming_rwkv", "kernels")
# The name under which a requirement is imported, if it is another one.
MODULES = {
    "cuda-bindings": "cuda.bindings",
    "cuda-core": "cuda.core",
    "mosaicml": "composer",
    "mosaicml-streaming": "streaming",
}
HIDDEN = ("PYTHON", "VIRTUAL_ENV", "AWS_", "S3_", "LOCAL_RANK", "RAY_ADDRESS")
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the first download of some 150 MB; with a warm cache the whole file takes two minutes
]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A virtual environment, used from a folder that has none of the project's sources."""

    folder: Path
    work: Path

    def run(self, *arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS`, without what this process's environment says about Python or S3."""
        return subprocess.run(
            [self.folder / "bin" / "python", *arguments],
            cwd=self.work, env=OUTSIDE | settings, capture_output=True, text=True,
        )  # fmt: skip

    def succeed(self, *arguments: str | Path, **settings: str) -> str:
        done = self.run(*arguments, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def refused(self, *arguments: str | Path) -> str:
        """The one line that a command ends with."""
        done = self.run(*arguments)
        assert done.returncode == 1, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        return line


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that an install reads: the build writes beside them."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in INSTALLED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@contextlib.contextmanager
def made_once(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bool]]:
    """A folder that the workers of a test session share, and whether the one that now holds it has to fill it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"fresh-{name}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, not (folder / "complete").exists()
        (folder / "complete").touch()


def new_environment(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)


def pip(*arguments: str | Path) -> str:
    """`pip ARGUMENTS` of the tests' environment, which can install into others and saves them one of their own."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], env=OUTSIDE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def environment_with(name: str, tmp_path_factory: pytest.TempPathFactory, *arguments: str | Path) -> Environment:
    """An environment in which pip has installed ARGUMENTS; each worker uses it from a folder of its own."""
    with made_once(name, tmp_path_factory) as (folder, is_missing):
        if is_missing:
            new_environment(folder / "venv")
            pip("--python", folder / "venv/bin/python", "install", "--quiet", "--no-compile", *arguments)
    return Environment(folder=folder / "venv", work=tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with made_once("wheel", tmp_path_factory) as (folder, is_missing):
        if is_missing:
            said = pip("wheel", "--verbose", "--no-deps", "--wheel-dir", folder, checkout)
            assert "would be ignored" not in said  # setuptools, of folders that it takes for packages
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def newest(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return environment_with("newest", tmp_path_factory, wheel)


def requirements(wheel: Path, extra: str = "") -> list[Requirement]:
    """The requirements of an extra, or those of the base."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = HeaderParser().parsestr(archive.read(metadata).decode())
    found = [Requirement(field) for field in fields.get_all("Requires-Dist", [])]
    if extra:
        return [item for item in found if item.marker and item.marker.evaluate({"extra": extra})]
    return [item for item in found if item.marker is None]


def lowest_pin(requirement: Requirement) -> str:
    """The requirement at the lowest version that it allows: every range of the project's has one."""
    (lowest,) = (clause.version for clause in requirement.specifier if clause.operator in (">=", "=="))
    return f"{requirement.name}=={lowest}"


@pytest.fixture(scope="module")
def lowest(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    constraints = tmp_path_factory.mktemp("constraints") / "lowest.txt"
    pins = {item.name: lowest_pin(item) for item in requirements(wheel)}
    constraints.write_text("".join(f"{pin}\n" for pin in pins.values()))
    environment = environment_with("lowest", tmp_path_factory, "--constraint", constraints, wheel)
    installed = environment.succeed("-c", "import importlib.metadata as m; print(m.version('xxhash'))")
    assert f"xxhash=={installed.strip()}" == pins["xxhash"]
    return environment


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English, Chinese and code, in every compression that is read."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = {
        "en.jsonl.gz": [f"The {n}th fox jumps over {n * n} lazy dogs. " * (1 + n % 9) for n in range(120)],
        "zh.jsonl.zst": [f"床前明月光，疑是地上霜。举头望{n}明月，低头思故乡。" * (1 + n % 7) for n in range(120)],
        "code.jsonl": [f"def f{n}(x):\n    return x + {n}\n" * (1 + n % 5) for n in range(120)],
    }
    compress: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor().compress,
        ".jsonl": bytes,
    }
    for name, documents in texts.items():
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents).encode()
        (folder / name).write_bytes(compress[Path(name).suffix](lines))
    return folder


def shards(folder: Path) -> dict[str, bytes]:
    """Every shard, decompressed: the compressed bytes differ between releases of zstandard."""
    found = {
        str(path.relative_to(folder)): zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        for path in folder.rglob("*.mds.zstd")
    }
    assert found
    return found


def build(environment: Environment, corpus: Path, tokenizer: Path | str) -> dict[str, bytes]:
    name = Path(tokenizer).name
    recipe, out = environment.work / f"{name}.yaml", environment.work / f"data-{name}"
    values = {
        "out": str(out),
        "tokenizer": str(tokenizer),
        "sources": {"all": {"paths": str(corpus)}},
        "edges": [64, 128, 256],
        "pack_tokens": 512,
        "validation": 0.1,
        "workers": 1,
    }
    recipe.write_text(json.dumps(values))  # JSON is YAML
    environment.succeed("-m", "prep", "build", recipe)
    environment.succeed("-m", "prep", "verify", out)
    return shards(out)


def test_the_newest_and_the_lowest_requirements_build_the_same_shards(
    newest: Environment, lowest: Environment, corpus: Path
) -> None:
    recipe, trained = newest.work / "tokenizer.yaml", newest.work / "trained"
    recipe.write_text(
        json.dumps({"out": "unused", "tokenizer": "rwkv-world", "sources": {"all": {"paths": str(corpus)}}})
    )
    newest.succeed("-m", "prep", "train-tokenizer", recipe, "--vocab-size", "400", "--to", trained)
    for tokenizer in ("rwkv-world", trained):
        assert build(newest, corpus, tokenizer) == build(lowest, corpus, tokenizer)


def test_the_newest_and_the_lowest_requirements_show_a_data_set(
    newest: Environment, lowest: Environment, corpus: Path
) -> None:
    build(newest, corpus, "rwkv-world")
    for environment in (newest, lowest):
        out = newest.work / "data-rwkv-world"
        assert "床前明月光" in environment.succeed("-m", "prep", "inspect", out, "--count", "400")
        environment.succeed("-m", "prep", "report", out, "--to", environment.work / "report")


def test_a_wheel_carries_the_kernels_and_no_package_named_kernels(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*") if path.is_file())
    assert sorted(name for name in names if "kernels/" in name) == [f"streaming_rwkv/{name}" for name in sources]
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"prep", "streaming_rwkv"}


def test_an_installed_package_finds_its_kernels(newest: Environment) -> None:
    source = "from streaming_rwkv.ops import build; print(build.kernel_source('wkv7/wkv7.cpp'))"
    # `ops` imports torch; the module that finds the sources does not.
    stub = "import sys, types; m = types.ModuleType('streaming_rwkv.ops'); import streaming_rwkv; "
    stub += "m.__path__ = [streaming_rwkv.__path__[0] + '/ops']; sys.modules['streaming_rwkv.ops'] = m; "
    assert Path(newest.succeed("-c", stub + source).strip()).is_file()


@pytest.mark.parametrize(
    ("module", "package"),
    [("train", "torch"), ("generate", "torch"), ("evaluate", "torch"), ("export", "torch"), ("plot", "matplotlib")],
)
def test_without_the_extra_train_one_line_names_it(newest: Environment, module: str, package: str) -> None:
    line = newest.refused("-m", f"streaming_rwkv.{module}", "x.yaml", "y")
    assert line.startswith(f"error: {package}")
    assert "not installed" in line
    assert "run `pip install '.[train]'` in a clone of streaming-rwkv" in line


def test_the_program_with_all_commands_is_installed(newest: Environment) -> None:
    program = newest.folder / "bin" / "streaming-rwkv"
    assert newest.succeed(program, "--version") == f"streaming-rwkv {importlib.metadata.version('streaming-rwkv')}\n"
    assert "error: x.yaml: no such file" in newest.refused(program, "prepare", "x.yaml")
    for command in ("train", "generate", "evaluate", "export", "plot"):
        assert "run `pip install '.[train]'`" in newest.refused(program, command, "x.yaml", "y")


def test_the_launchers_script_says_the_same(newest: Environment, checkout: Path) -> None:
    assert "run `pip install '.[train]'`" in newest.refused(checkout / "train.py", "yamls/tiny_cpu.yaml")


def test_without_the_extras_s3_and_ray_one_line_names_them(newest: Environment) -> None:
    recipe = newest.work / "missing.yaml"
    (newest.work / "one.jsonl").write_text('{"text": "one"}\n')
    values = {"tokenizer": "rwkv-world", "sources": {"all": {"paths": "one.jsonl"}}, "out": "missing"}
    recipe.write_text(json.dumps(values))
    assert "run `pip install '.[s3]'`" in newest.refused("-m", "prep", "build", recipe, "out=s3://bucket/set")
    assert "run `pip install '.[ray]'`" in newest.refused("-m", "prep", "build", recipe, "engine=ray")


@pytest.mark.parametrize("command", [("-m", "prep", "build", "x.yaml"), ("train.py", "x.yaml")])
def test_a_python_without_any_requirement_gets_one_line(checkout: Path, tmp_path: Path, command: Sequence[str]) -> None:
    new_environment(tmp_path / "venv")
    bare = Environment(folder=tmp_path / "venv", work=checkout)
    line = bare.refused(*command)
    assert "omegaconf" in line
    assert "run `pip install" in line


@pytest.mark.parametrize("extra", ["train", "cuda", "s3", "ray"])
def test_the_environment_of_the_tests_has_what_an_extra_promises(wheel: Path, extra: str) -> None:
    """`make` installs these extras together; installing each alone takes gigabytes."""
    promised = [item for item in requirements(wheel, extra) if item.name != "streaming-rwkv"]
    assert promised
    for item in promised:
        assert item.specifier.contains(importlib.metadata.version(item.name)), item
        assert importlib.util.find_spec(MODULES.get(item.name, item.name)), item


@pytest.mark.parametrize("extra", ["wandb", "mlflow", "bench"])
def test_the_index_has_what_other_extras_promise(wheel: Path, extra: str) -> None:
    promised = [item for item in requirements(wheel, extra) if item.name != "streaming-rwkv"]
    assert promised
    wanted = [f"{item.name}{item.specifier}" for item in promised]
    pip("install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:", *wanted)
