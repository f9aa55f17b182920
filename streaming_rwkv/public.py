"""Public names of a package, each imported when it is used for the first time.

A preparation cluster has no torch, and importing it takes seconds, so a package must not import what it exports. Some
public functions have the name of a module of their package (`prep.build`, `streaming_rwkv.generate`). Importing such a
module would replace the function, so that assignment is ignored: the module is in `sys.modules` all the same.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from streaming_rwkv.extras import install_command


class LazyPackage(ModuleType):
    """A package whose public names are attributes although their modules are not imported yet."""

    _homes: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        homes: Mapping[str, str] = self.__dict__["_homes"]
        if name not in homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        try:
            value = getattr(importlib.import_module(homes[name]), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == self.__name__:
                raise
            raise ModuleNotFoundError(
                f"{self.__name__}.{name} needs the package {error.name.partition('.')[0]}, which is not installed; "
                f"run {install_command('train')}",
                name=error.name,
            ) from error
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and name in self.__dict__.get("_homes", ()):
            return  # by the import of a module with the name of a public function
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__dict__["_homes"]})


def import_when_used(package: str, homes: Mapping[str, str]) -> None:
    """Make the names in `homes` attributes of a package; the values are the modules that define them."""
    module = sys.modules[package]
    module.__dict__["_homes"] = homes
    module.__class__ = LazyPackage
