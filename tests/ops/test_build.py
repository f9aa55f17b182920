"""Kernels are compiled once, kept, found wherever the package lies; and every way to fail says what to do."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from streaming_rwkv.ops import build
from streaming_rwkv.ops.build import KernelError, build_cpp, cache_folder, cached, kernel_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    path = folder / "answer.cpp"
    path.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    return path


def answer(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).answer())


def test_the_second_build_is_the_file_of_the_first(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, second = build_cpp(source), build_cpp(source)
    assert first == second
    assert answer(first) == 42
    announced, done = (record.message for record in caplog.records)
    assert announced.startswith("compiling answer.so, once")
    assert done.startswith("compiled answer.so in ")
    assert [path.name for path in cache_folder().iterdir()] == [first.name]  # nothing temporary stays


def test_a_changed_source_header_or_flag_is_another_file(source: Path) -> None:
    first = build_cpp(source)
    source.with_name("answer.h").write_text("#define ANSWER 43\n")
    second = build_cpp(source)
    source.write_text('extern "C" int answer() { return 44; }\n')
    third = build_cpp(source)
    fourth = build_cpp(source, flags=["-DUNUSED"])
    assert [answer(path) for path in (first, second, third, fourth)] == [42, 43, 44, 44]
    assert len({first, second, third, fourth}) == 4


def test_what_the_source_includes_from_elsewhere_counts_too(source: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.inc"
    paths = []
    for content in ("1", "2"):
        elsewhere.write_text(content)
        source.write_text(f'extern "C" int answer() {{ return\n#include "{elsewhere}"\n; }}')
        paths.append(build_cpp(source, reads=[elsewhere]))
    assert [answer(path) for path in paths] == [1, 2]


def test_processes_that_build_at_the_same_time_do_no_harm(source: Path) -> None:
    program = (
        "import ctypes, sys; from pathlib import Path; from streaming_rwkv.ops.build import build_cpp;"
        "print(ctypes.CDLL(str(build_cpp(Path(sys.argv[1])))).answer())"
    )
    command = [sys.executable, "-c", program, str(source)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == ["42"] * 3
    assert len(list(cache_folder().iterdir())) == 1


def test_a_build_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("half.so", ["key"], interrupted)
    assert list(cache_folder().iterdir()) == []


def test_no_compiler_says_how_to_get_one(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        KernelError, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\) on PATH.*apt-get install g\+\+"
    ):
        build_cpp(source)


def test_cxx_that_is_no_program(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(KernelError, match=r"CXX is 'no-such-compiler -m64', which is no program here"):
        build_cpp(source)


def test_cxx_chooses_the_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{shutil.which('g++') or shutil.which('c++')} -DCHOSEN")
    source.write_text('#ifdef CHOSEN\nextern "C" int answer() { return 7; }\n#endif\n')
    assert answer(build_cpp(source)) == 7


def test_source_that_does_not_compile_shows_command_and_message(source: Path) -> None:
    source.write_text("int f() { return missing; }\n")
    with pytest.raises(KernelError, match=r"failed while compiling .*answer\.cpp(?s:.*)-O3(?s:.*)missing"):
        build_cpp(source)
    assert list(cache_folder().iterdir()) == []


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(
        KernelError, match=r"cache of compiled kernels cannot be made .*; fix that, or set XDG_CACHE_HOME to a folder"
    ):
        build_cpp(source)


def test_the_cache_lies_in_the_home_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "streaming-rwkv" / "kernels"


@pytest.mark.parametrize("layout", ["installed", "checkout"])
def test_sources_are_found(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "streaming_rwkv"
    kernels = package / "kernels" if layout == "installed" else tmp_path / "kernels"
    (kernels / "wkv7").mkdir(parents=True)
    (kernels / "wkv7" / "wkv7.cpp").touch()
    monkeypatch.setattr(build, "__file__", str(package / "ops" / "build.py"))
    assert kernel_source("wkv7/wkv7.cpp") == kernels / "wkv7" / "wkv7.cpp"


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "__file__", str(tmp_path / "streaming_rwkv" / "ops" / "build.py"))
    with pytest.raises(KernelError, match=r"kernel source wkv7/wkv7\.cpp: found neither .* nor .*; reinstall"):
        kernel_source("wkv7/wkv7.cpp")
