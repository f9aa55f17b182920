"""The way of a configuration through the code: each call that hands it, or a part of it, on.

    python -m tools.config_walk MODULE ARGUMENT …

Runs `python -m MODULE ARGUMENT …` and prints every function that got a configuration as an argument, in order, and how
often that led from one module into another. Training is followed to its first step.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import threading
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("prep", "streaming_rwkv"))
CONFIGS = ("prep.config", "streaming_rwkv.train.config")
OWN = tuple(f"{name.replace('.', '/')}.py" for name in CONFIGS)
FIRST_STEP = ("streaming_rwkv/train/composer_model.py", "forward")


class Walk(NamedTuple):
    """The functions that got a configuration: (module, function)."""

    calls: list[tuple[str, str]]

    def stops(self) -> list[str]:
        """Return the modules, each as often as the configuration came into it from another one."""
        return [module for module, _ in groupby(module for module, _ in self.calls)]

    def returns(self) -> int:
        """Return how often the configuration came back into a module that it had left."""
        stops = self.stops()
        return len(stops) - len(set(stops))


def follow(module: str, arguments: list[str]) -> Walk:
    """Run a program of ours in this process, and note what its configuration passes through."""
    calls: list[tuple[str, str]] = []
    seen: set[FrameType] = set()  # a generator is called once and resumed often
    has_ended = False

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal has_ended
        code = frame.f_code
        if has_ended or event != "call" or not code.co_filename.startswith(PACKAGES) or frame in seen:
            return
        here = str(Path(code.co_filename).relative_to(ROOT))
        has_ended = (here, code.co_name) == FIRST_STEP
        if has_ended:
            sys.setprofile(None)  # it makes all calls slower
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        passed = (frame.f_locals.get(name) for name in names if name != "self")
        if not code.co_name.startswith("<") and any(map(_is_config, passed)) and here not in OWN:
            seen.add(frame)
            calls.append((here, code.co_name))

    program = importlib.import_module(f"{module}.__main__")
    threading.setprofile(note)  # some of it runs in threads, one at a time
    sys.setprofile(note)
    try:
        status = program.main(arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if status:
        raise SystemExit(status)
    return Walk(calls)


def _is_config(value: Any) -> bool:
    return type(value).__module__ in CONFIGS and type(value).__name__.endswith("Config")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    walk = follow(options.module, options.arguments)
    for module, function in walk.calls:
        print(f"{module}: {function}")
    print(f"{len(walk.stops())} stops, {walk.returns()} returns, {len(set(walk.stops()))} modules")


if __name__ == "__main__":
    main()
