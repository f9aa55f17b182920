"""Kernels are compiled once, kept, and found wherever the package is installed; every error names its remedy."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
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
    # nothing temporary stays
    assert sorted(path.name for path in cache_folder().iterdir()) == [first.name, f"{first.name}.sha256"]


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


def test_processes_that_start_at_the_same_time_build_once(source: Path) -> None:
    program = (
        "import ctypes, sys; from pathlib import Path; from streaming_rwkv.ops.build import build_cpp;"
        "print(ctypes.CDLL(str(build_cpp(Path(sys.argv[1])))).answer())"
    )
    command = [sys.executable, "-c", program, str(source)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == ["42"] * 3
    assert len(list(cache_folder().glob("*.so"))) == 1
    assert len(list(cache_folder().iterdir())) == 2  # the file and its hash


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


def test_a_full_disk_is_not_the_compilers_fault(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(
        "#!/bin/sh\ncase $* in *--version*) echo 1;; *) echo 'error: No space left on device' >&2; exit 1; esac\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(
        KernelError, match=r"no space is left where it writes .*; make space in .*, or set XDG_CACHE_HOME"
    ):
        build_cpp(source)


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


def write_ten(path: Path) -> None:
    path.write_text("ten bytes.")


@pytest.mark.parametrize("damage", ["empty", "truncated", "changed", "without its hash"])
def test_a_damaged_file_is_built_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = cached("kernel.so", ["key"], write_ten)
    assert path.with_name(f"{path.name}.sha256").read_text() == hashlib.sha256(b"ten bytes.").hexdigest()
    match damage:
        case "empty":
            path.write_text("")
            path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(b"").hexdigest())
        case "truncated":
            path.write_text("ten")
        case "changed":
            path.write_text("Ten bytes.")
        case "without its hash":
            path.with_name(f"{path.name}.sha256").unlink()
    assert cached("kernel.so", ["key"], write_ten) == path
    assert path.read_text() == "ten bytes."
    assert f"{path}: damaged, or without its hash; compiling it again" in caplog.messages
    caplog.clear()
    cached("kernel.so", ["key"], write_ten)
    assert caplog.messages == []


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o644), (0o002, 0o644), (0o022, 0o644), (0o077, 0o600)])
def test_only_the_user_can_write_to_the_cache(umask: int, mode: int, source: Path) -> None:
    before = os.umask(umask)
    try:
        path = build_cpp(source)
    finally:
        os.umask(before)
    assert cache_folder().stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == mode
    assert build_cpp(source) == path


@pytest.mark.parametrize("of", ["folder", "file"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_file_that_others_can_write_is_not_loaded(of: str, mode: int) -> None:
    path = cached("kernel.so", ["key"], write_ten)
    shared = path if of == "file" else path.parent
    shared.chmod(mode)
    with pytest.raises(KernelError) as caught:
        cached("kernel.so", ["key"], write_ten)
    assert str(caught.value) == (
        f"{shared}: its permissions are {mode:o}, so other users can change the compiled kernels that are loaded "
        f"from it; remove it if others may have done so, or run `chmod go-w {shared}`, or set XDG_CACHE_HOME to a "
        "folder of your own"
    )


def test_an_empty_folder_that_others_can_write_is_not_used() -> None:
    cache_folder().mkdir(parents=True)
    cache_folder().chmod(0o777)
    with pytest.raises(KernelError, match=r"kernels: its permissions are 777"):
        cached("kernel.so", ["key"], write_ten)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("of", ["folder", "file"])
def test_a_file_of_another_user_is_not_loaded(of: str) -> None:
    path = cached("kernel.so", ["key"], write_ten)
    given = path if of == "file" else path.parent
    os.chown(given, 1234, 1234)
    with pytest.raises(KernelError) as caught:
        cached("kernel.so", ["key"], write_ten)
    assert str(caught.value) == (
        f"{given}: belongs to user 1234, not to this one (0), and compiled kernels are loaded only from files of this "
        "user; set XDG_CACHE_HOME to a folder of your own"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a passwd entry")
def test_a_user_without_a_home_folder_is_told_the_variable() -> None:
    program = (
        "import os\n"
        "from streaming_rwkv.ops.build import KernelError, cache_folder\n"
        "os.setuid(54321)\n"
        "try:\n    cache_folder()\nexcept KernelError as error:\n    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == (
        "cache of compiled kernels: HOME is not set and user 54321 has no home folder; set XDG_CACHE_HOME to a folder "
        "of your own\n"
    ), result.stderr


def compiler_that(does: str, folder: Path) -> str:
    """Write a compiler that tells its version, and otherwise runs the lines of `does`."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\n{does}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("does", ["exit 0", 'for last; do :; done; : > "$last"', 'for last; do :; done; rm "$last"'])
def test_a_compiler_without_output_is_refused(
    does: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler_that(does, tmp_path))
    with pytest.raises(
        KernelError, match=r"compiler: reported no error while compiling .*answer\.cpp, but wrote nothing"
    ):
        build_cpp(source)
    assert list(cache_folder().iterdir()) == []


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_compiler_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child"
    compiler = compiler_that(f"sleep 1000 & echo $! > {child}; wait", tmp_path)
    monkeypatch.setattr(build, "COMPILER_SECONDS", 3.0)
    with pytest.raises(KernelError, match=r"compiler: stopped after 3 s while compiling it; the command was(?s:.*)CXX"):
        cached("kernel.so", ["key"], lambda path: build._run([compiler, str(path)], doing="compiling it") and None)
    assert list(cache_folder().iterdir()) == []
    if child.exists() and (process := child.read_text()):  # under load, it may not have been started in that time
        give_up = time.monotonic() + 60
        while is_running(int(process)):
            assert time.monotonic() < give_up
            time.sleep(0.01)
