"""The code of a hook: its module and the user's own modules that it imports, at any depth.

Installed modules (the standard library, site-packages) and this project are left out: a hook's author does not edit
them. Imports are read from the source, since `sys.modules` does not tell which module imported another.
"""

from __future__ import annotations

import ast
import hashlib
import site
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from streaming_rwkv.config import UserError

_OURS = {"prep", "streaming_rwkv"}


def code_digest(module: str) -> str:
    """Return the sha256 of the file of `module`, or of all files together if it imports the user's own modules.

    Raises:
        UserError: one of the files cannot be read.
    """
    files = _own_files(module)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    own = digests.pop(module, "builtin")
    if not digests:
        return own
    lines = [f"{name} {digest}" for name, digest in ((module, own), *digests.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _own_files(module: str) -> dict[str, bytes]:
    """Return the content of `module` and of the user's modules that it imports, by module name."""
    found: dict[str, bytes] = {}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # a package's __init__ runs before its modules
        spec = _find(name)
        if spec is None or not spec.has_location or spec.origin is None:
            continue
        if name != module and (name.partition(".")[0] in _OURS or _is_installed(spec.origin)):
            continue
        try:
            found[name] = Path(spec.origin).read_bytes()
        except OSError as error:
            raise UserError(f"{spec.origin}: a hook's module cannot be read ({error.strerror})") from None
        is_package = spec.submodule_search_locations is not None
        waiting += _imported(found[name], package=name if is_package else name.rpartition(".")[0])
    return found


def _imported(content: bytes, *, package: str) -> Iterator[str]:
    """Yield names of modules that a source imports, at any place in it; some may be names of other things."""
    try:
        tree = ast.parse(content)
    except (
        SyntaxError,
        ValueError,
        RecursionError,
    ):  # a compiled extension; load_hook has reported a hook's syntax error
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)  # a module, or another name in `base`


def _find(name: str) -> ModuleSpec | None:
    """Find a module without importing the packages above it."""
    first, *rest = name.split(".")
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__spec__", None) is not None:
        return loaded.__spec__
    spec = PathFinder.find_spec(first)
    above = first
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        above = f"{above}.{part}"
        spec = PathFinder.find_spec(above, list(spec.submodule_search_locations))
    return spec


def _is_installed(file: str) -> bool:
    path = Path(file).resolve()
    return any(path.is_relative_to(folder) for folder in _installed_folders())


@lru_cache(maxsize=1)
def _installed_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple(Path(folder).resolve() for folder in folders)
