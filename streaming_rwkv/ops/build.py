"""Kernels, compiled at their first use and kept on disk: the folder of sources, the cache, the system's C++ compiler.

Nothing here runs at import. A cached file's name is a hash of all that decides its content. Its sha256 is stored beside
it and checked before it is loaded, and it is code: it is loaded only from a folder that no other user can write to.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from streaming_rwkv.errors import UserError
from streaming_rwkv.filesystem import atomic_file, make_folder, wait_for_lock, write_atomically
from streaming_rwkv.shards import sha256_of_file

logger = logging.getLogger(__name__)

CPP_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
COMPILER_SECONDS = 600.0  # far more than any of our sources needs, on a busy machine too
_DISK_FULL = re.compile("No space left on device|Disk quota exceeded")  # what compilers and linkers print
_OWN_FOLDER = "set XDG_CACHE_HOME to a folder of your own"


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
    """Return the folder of compiled kernels: streaming-rwkv/kernels below XDG_CACHE_HOME or ~/.cache.

    Raises:
        KernelError: the user has no home folder, and XDG_CACHE_HOME is not set.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        raise KernelError(
            f"cache of compiled kernels: HOME is not set and user {os.getuid()} has no home folder; {_OWN_FOLDER}"
        ) from None
    return cache / "streaming-rwkv" / "kernels"


def cached(name: str, key: Sequence[str | bytes], build: Callable[[Path], None]) -> Path:
    """Return the file that `build` makes, from the cache if it is there and undamaged.

    Args:
        name: what the file is, its suffix included; for people who look into the folder.
        key: everything that decides its content.
        build: writes the file at the path it is given.
    Raises:
        KernelError: the cache folder cannot be written, or others can write to it or to the file.
    """
    digest = hashlib.sha256()
    for part in key:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    folder = cache_folder()
    path = folder / f"{Path(name).stem}-{digest.hexdigest()[:20]}{Path(name).suffix}"
    if _is_whole(path):
        return path
    try:
        make_folder(
            folder,
            what="cache of compiled kernels",
            remedy="set XDG_CACHE_HOME to a folder that can be written",
            mode=0o700,
        )
    except UserError as error:
        raise KernelError(str(error)) from error
    _check_private(folder)
    with wait_for_lock(folder, timeout_seconds=COMPILER_SECONDS):
        if not _is_whole(path):  # another process may have built it meanwhile
            _build(name, path, build)
    return path


def _build(name: str, path: Path, build: Callable[[Path], None]) -> None:
    if path.exists():
        logger.warning("%s: damaged, or without its hash; compiling it again", path)
    started = time.monotonic()
    logger.info("compiling %s, once for this machine; half a minute or so", name)
    with atomic_file(path, durable=True, concurrent=True) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o644  # linkers replace the file, with a mode of their own
        build(temporary)
        temporary.chmod(mode)
        sha256 = sha256_of_file(temporary)
    write_atomically(_hash_path(path), sha256.encode())
    logger.info("compiled %s in %.1f s: %s", name, time.monotonic() - started, path)


def _hash_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _is_whole(path: Path) -> bool:
    """Return True for a cached file that is not empty and has the hash stored beside it.

    Raises:
        KernelError: another user owns it or its folder, or can write to them.
    """
    try:
        _check_private(path.parent)
        _check_private(path)
        expected = _hash_path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # `make_folder` explains the last two
        return False
    return path.stat().st_size > 0 and sha256_of_file(path).encode() == expected


def _check_private(path: Path) -> None:
    """Check that only this user can change a file or folder whose content is executed.

    Raises:
        KernelError: another user owns it, or its group or others can write to it.
    """
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise KernelError(
            f"{path}: belongs to user {status.st_uid}, not to this one ({os.geteuid()}), and compiled kernels are "
            f"loaded only from files of this user; {_OWN_FOLDER}"
        )
    if (mode := stat.S_IMODE(status.st_mode)) & 0o022:
        raise KernelError(
            f"{path}: its permissions are {mode:03o}, so other users can change the compiled kernels that are loaded "
            f"from it; remove it if others may have done so, or run `chmod go-w {shlex.quote(str(path))}`, or "
            f"{_OWN_FOLDER}"
        )


def build_cpp(source: Path, *, flags: Sequence[str] = (), reads: Sequence[Path] = ()) -> Path:
    """Build the shared library of one C++ file, for this machine's processor.

    Args:
        flags: for the compiler, after our own.
        reads: what the file includes besides the headers beside it.
    Raises:
        KernelError: no compiler, or one that does not compile it in `COMPILER_SECONDS`.
    """
    compiler = _compiler()
    command = [*compiler, *CPP_FLAGS, _native_flag(), *flags, str(source)]
    headers = sorted(path for path in source.parent.iterdir() if path.suffix == ".h")

    def build(path: Path) -> None:
        _run([*command, "-o", str(path)], doing=f"compiling {source}")
        if not path.is_file() or path.stat().st_size == 0:
            raise KernelError(
                f"{compiler[0]}: reported no error while compiling {source}, but wrote nothing; the command was\n"
                f"  {shlex.join(command)}\ncheck that it is a C++ compiler, or choose one with CXX"
            )

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
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=COMPILER_SECONDS)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the programs that the compiler has started
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise KernelError(
                f"{command[0]}: stopped after {COMPILER_SECONDS:g} s while {doing}; the command was\n"
                f"  {shlex.join(command)}\nrun it by hand to see why it does not end, or choose a compiler with CXX"
            ) from None
    if process.returncode:
        if _DISK_FULL.search(errors):
            raise KernelError(
                f"{command[0]}: no space is left where it writes while {doing}; make space in {cache_folder()} and "
                f"{tempfile.gettempdir()}, or set XDG_CACHE_HOME or TMPDIR to a folder on another disk"
            )
        raise KernelError(
            f"{command[0]}: failed while {doing}; the command was\n  {shlex.join(command)}\n{errors.strip()}\n"
            "GCC 9 or newer and Clang 12 or newer are known to work; choose one with CXX"
        )
    return output


def _native_flag() -> str:
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"


def _processor_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
