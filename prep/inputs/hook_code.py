"""The code that a hook consists of: its module and the user's own modules that this one imports, at any depth.

What is installed (the standard library, site-packages) is left out: a hook's author does not edit it. So is this
project. Imports are read from the source, since a module that was imported is not told from one that is in use.
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
    """Return the sha256 of the file of `module`; where it imports the user's own modules, of all their files together.

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
    """The content of the files of `module` and of the user's modules that it imports, by the modules' names."""
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
    """Names of modules that a source may import, wherever in it the import is written."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):  # a compiled extension; of a hook's own, the import has told
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)  # a module, or something in `base`


def _find(name: str) -> ModuleSpec | None:
    """Where a module lies, found without importing a package on the way to it."""
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
