"""Kernels, compiled at their first use and kept on disk: where the sources lie, the cache, the system's C++ compiler.

Nothing here runs at import. A cached file's name is a hash of all that decides its content, and it comes into place by
a rename: processes that build it at the same time do the work twice and no harm.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from streaming_rwkv.errors import UserError
from streaming_rwkv.filesystem import atomic_file, make_folder

logger = logging.getLogger(__name__)

CPP_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")


class KernelError(UserError):
    """A kernel that cannot be built or loaded on this machine."""


def kernel_source(name: str) -> Path:
    """`kernels/{name}`: package data where the package is installed, beside the package in a checkout.

    Raises:
        KernelError: in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    places = [package / "kernels" / name, package.parent / "kernels" / name]
    for place in places:
        if place.is_file():
            return place
    raise KernelError(
        f"kernel source {name}: found neither {places[0]} nor {places[1]}; reinstall streaming-rwkv, "
        "or run from a whole checkout"
    )


def cache_folder() -> Path:
    """Return the folder of compiled kernels: streaming-rwkv/kernels below XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "streaming-rwkv" / "kernels"


def cached(name: str, key: Sequence[str | bytes], build: Callable[[Path], None]) -> Path:
    """Return the file that `build` makes, from the cache if it holds the file.

    Args:
        name: what the file is, its suffix included; for people who look into the folder.
        key: everything that decides its content.
        build: writes the file at the path it is given.
    Raises:
        KernelError: the cache folder cannot be written.
    """
    digest = hashlib.sha256()
    for part in key:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    folder = cache_folder()
    path = folder / f"{Path(name).stem}-{digest.hexdigest()[:20]}{Path(name).suffix}"
    if path.exists():
        return path
    try:
        make_folder(
            folder, what="cache of compiled kernels", remedy="set XDG_CACHE_HOME to a folder that can be written"
        )
    except UserError as error:
        raise KernelError(str(error)) from error
    started = time.monotonic()
    logger.info("compiling %s, once for this machine; half a minute or so", name)
    with atomic_file(path, concurrent=True) as temporary:
        build(temporary)
    logger.info("compiled %s in %.1f s: %s", name, time.monotonic() - started, path)
    return path


def build_cpp(source: Path, *, flags: Sequence[str] = (), reads: Sequence[Path] = ()) -> Path:
    """Build the shared library of one C++ file, for this machine's processor.

    Args:
        flags: for the compiler, after our own.
        reads: what the file includes besides the headers beside it.
    Raises:
        KernelError: no compiler, or one that does not compile it.
    """
    compiler = _compiler()
    command = [*compiler, *CPP_FLAGS, _native_flag(), *flags, str(source)]
    headers = sorted(path for path in source.parent.iterdir() if path.suffix == ".h")

    def build(path: Path) -> None:
        _run([*command, "-o", str(path)], doing=f"compiling {source}")

    version = _run([*compiler, "--version"], doing="asking for its version")
    # Machines of different kinds may share a home folder, and each needs its own -march=native.
    key = [*command, version, platform.machine(), _processor_features()]
    return cached(f"{source.stem}.so", [*key, *(path.read_bytes() for path in (source, *headers, *reads))], build)


def _compiler() -> list[str]:
    """$CXX, or the first of the usual names that is there."""
    if chosen := os.environ.get("CXX"):
        words = shlex.split(chosen)
        if words and shutil.which(words[0]):
            return words
        raise KernelError(f"CXX is {chosen!r}, which is no program here; set it to a C++ compiler, or unset it")
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise KernelError(
        "no C++ compiler (c++, g++, clang++) on PATH, and the CPU kernel is compiled on first use; install one "
        "(Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; conda: conda install gxx), or set CXX"
    )


def _run(command: list[str], *, doing: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise KernelError(
            f"{command[0]}: failed while {doing}; the command was\n  {shlex.join(command)}\n{result.stderr.strip()}\n"
            "GCC 9 or newer and Clang 12 or newer are known to work; choose one with CXX"
        )
    return result.stdout


def _native_flag() -> str:
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"


def _processor_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
