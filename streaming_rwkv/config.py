"""Typed configuration: a YAML file and `key=value` overrides, merged by OmegaConf, validated by pydantic.

A component declares its own `Config` beside its code; the front ends only compose them. Errors name the file, the
key and the nearest valid key, since a misspelt key that is silently ignored costs a training run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml import YAMLError

from streaming_rwkv.errors import UserError


class ConfigError(UserError):
    """A configuration file or an override that cannot be used."""


def without_credentials(text: str) -> str:
    """Return `text` with what may be secret in its URLs cut out: user information and queries (signatures)."""
    return re.sub(r"://[^\s'\"]*[@?][^\s'\"]*", "://…", text)


class Config(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


__all__ = ["Config", "ConfigError", "UserError", "configs_within", "load_config", "validate"]

ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(config_type: type[ConfigT], path: str | Path, *, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path`, apply `key=value` overrides (dots for nesting), validate.

    Raises:
        ConfigError: unreadable file, malformed override, unknown key, or a value of the wrong kind.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):
        raise ConfigError(f"{without_credentials(str(path))}: configurations are read from local files; copy it here")
    path = Path(path)
    malformed = [override for override in overrides if "=" not in override or override.startswith("=")]
    if malformed:
        shown = without_credentials(malformed[0])
        raise ConfigError(f"command line: {shown!r} is not an override; write key=value, e.g. seed=17")
    try:
        merged = OmegaConf.load(path)
        for override in overrides:
            _apply(merged, override)
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found a {type(values).__name__} at the top, expected a mapping of keys to values")
    return validate(config_type, values, where=str(path), overrides=overrides)


def _apply(config: Any, override: str) -> None:
    """Put one override in its place; merging them all at once cannot reach into lists (data.stages.0.tokens=…)."""
    key, _, value = override.partition("=")
    try:
        OmegaConf.update(config, key, OmegaConf.from_dotlist([f"value={value}"]).value, merge=True)
    except YAMLError as error:
        shown, why = without_credentials(override), without_credentials(str(error))
        raise ConfigError(f"command line: {shown!r}: the value is not valid YAML: {why}") from error
    except (OmegaConfBaseException, TypeError, IndexError) as error:  # a list's index that is none, or too large
        shown, why = without_credentials(override), without_credentials(str(error))
        raise ConfigError(f"command line: {shown!r} leads nowhere in the file: {why}") from error


def validate(
    config_type: type[ConfigT], values: dict[str, Any], *, where: str, overrides: Sequence[str] = ()
) -> ConfigT:
    """Build `config_type` from plain values; every problem becomes one line of the error.

    Raises:
        ConfigError: one line for each unknown, missing or wrong key.
    """
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        overridden = [override.partition("=")[0] for override in overrides]
        lines = []
        for problem in error.errors():
            location = tuple(problem["loc"])
            key = ".".join(str(part) for part in location)
            text = _explain(config_type, location, key, problem)
            place = "command line" if any(_is_about(text, key, override) for override in overridden) else where
            lines.append(f"{place}: {text}")
        raise ConfigError("\n".join(lines)) from None


def _is_about(text: str, key: str, override: str) -> bool:
    """Whether a problem at `key` is of what `override` gives: there, above, or below in a key that `text` names."""
    if f"{key}.".startswith(f"{override}."):
        return True
    below = override.removeprefix(f"{key}.") if key else override
    is_below = not key or override.startswith(f"{key}.")
    return is_below and re.search(rf"\b{re.escape(below.partition('.')[0])}\b", text.removeprefix(key)) is not None


def _explain(config_type: type[Config], location: tuple[int | str, ...], key: str, problem: Any) -> str:
    match problem["type"]:
        case "extra_forbidden":
            valid = _valid_keys(config_type, location[:-1])
            near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed here: {', '.join(sorted(valid))}"
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: required, but not given"
        case "value_error":
            text = str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"]
            return f"{key}: {text}" if key else text
        case _:
            found = without_credentials(repr(problem["input"]))
            return f"{key}: found {found}; {problem['msg']}"


def _valid_keys(config_type: type[Config], location: tuple[int | str, ...]) -> list[str]:
    """The field names of the configuration that lies at `location` below `config_type`."""
    candidates: list[type[Config]] = [config_type]
    for part in location:
        below: list[type[Config]] = []
        for candidate in candidates:
            field = candidate.model_fields.get(str(part))
            if field is not None:
                below += configs_within(field.annotation)
        # A list index, a mapping key or the tag of a union: the same configurations, one level down.
        candidates = below or candidates
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def configs_within(annotation: Any) -> list[type[Config]]:
    """The configurations that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [config for argument in get_args(annotation) for config in configs_within(argument)]
