"""Typed configuration: a YAML file and `key=value` overrides, merged by OmegaConf, validated by pydantic.

A component declares its own `Config` beside its code; the front ends only compose them. Errors name the file, the
key and the nearest valid key, since a misspelt key that is silently ignored costs a training run.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator
from yaml import YAMLError

from streaming_rwkv.errors import UserError, hide

Location: TypeAlias = tuple[int | str, ...]
MOST_BYTES, MOST_NODES = 1 << 22, 100_000  # of a YAML file
_SHARED_KEYS = {"seed"}  # both recipes and training YAMLs may have them
_OLD_NUMBER = re.compile(r"[-+]?(?:0[0-7_]+|[1-9][\d_]*(?::[0-5]?\d)+|\d[\d_]*(?::[0-5]?\d)+\.[\d_]*)")
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # one that is not escaped by a backslash


class ConfigError(UserError):
    """A configuration file or an override that cannot be used."""


def without_credentials(text: str) -> str:
    """Return `text` without the parts of its URLs that may be secret: user information and queries (signatures)."""
    return re.sub(r"://[^\s'\"]*[@?][^\s'\"]*", "://…", text)


class Config(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_values_are_no_numbers(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not any(isinstance(value, (bool, list, dict)) for value in values.values()):
            return values
        return _replaced(values, _find_truth_values(values, [cls]))


__all__ = ["Config", "ConfigError", "LoadedConfig", "UserError", "configs_within", "load_config", "validate"]


class LoadedConfig(Config):
    """Base of the configuration of a whole YAML file; it remembers which values were interpolations."""

    mistaken_for: ClassVar[tuple[frozenset[str], str]] = (frozenset(), "")
    """Keys at the top of another kind of YAML, and the text of the error if a file has two of them."""
    _interpolations: dict[Location, str] = PrivateAttr(default_factory=dict)
    """The text of each interpolation, by the location of its value."""

    def with_interpolations(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return `values`, a dump of this configuration or a part of it, in a form that may be saved or published.

        Interpolations replace their values, which may be secrets of the environment.
        """
        return _replaced(values, self._interpolations)

    def to_yaml(self) -> str:
        """Return YAML from which `load_config` reads this configuration again, with its interpolations unresolved."""
        return OmegaConf.to_yaml(_replaced(_escaped(self.model_dump(mode="json")), self._interpolations))


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(config_type: type[ConfigT], path: str | Path, *, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path`, apply `key=value` overrides (dots for nesting), validate.

    The text of an override is the literal value of a string field; for any other field it is read as YAML.

    Raises:
        ConfigError: unreadable file, malformed override, unknown key, or a value of the wrong kind.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):
        raise ConfigError(f"{without_credentials(str(path))}: configurations are read from local files; copy it here")
    path = Path(path)
    malformed = [override for override in overrides if "=" not in override or override.startswith("=")]
    if malformed:
        shown_override = without_credentials(malformed[0])
        raise ConfigError(f"command line: {shown_override!r} is not an override; write key=value, e.g. seed=17")
    interpolations: dict[Location, str] = {}
    try:
        merged = OmegaConf.create(_read_yaml(path))
        for override in overrides:
            _apply(merged, override, config_type)
        interpolations = _find_interpolations(OmegaConf.to_container(merged, resolve=False))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        shown = {".".join(str(part) for part in place): text for place, text in interpolations.items()}
        if interpolations:  # OmegaConf's text may show a value of the environment
            raise ConfigError(
                f"{path}: {key}: {shown.get(key) or ', '.join(shown.values())} cannot be resolved "
                f"({type(error).__name__}); check the names in it, and that each environment variable is set"
            ) from None
        reason = str(error).partition("\n")[0]  # further lines are about OmegaConf's own classes
        raise ConfigError(f"{path}: {f'{key}: ' if key else ''}{reason}") from error
    except RecursionError:
        raise ConfigError(f"{path}: interpolations (${{…}}) are nested too deeply, or refer to themselves") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found a {type(values).__name__} at the top, expected a mapping of keys to values")
    _hide_environment(values, interpolations)
    _check_kind(config_type, values, path)
    config = validate(config_type, values, where=str(path), overrides=overrides, secrets=interpolations)
    if isinstance(config, LoadedConfig):
        config._interpolations = interpolations
    return config


def _check_kind(config_type: type[Config], values: dict[Any, Any], path: Path) -> None:
    if not issubclass(config_type, LoadedConfig):
        return
    keys, explanation = config_type.mistaken_for
    if len(keys & set(values)) >= 2 and not set(values) & set(config_type.model_fields) - _SHARED_KEYS:
        raise ConfigError(f"{path}: {explanation.format(path=path)}")


def _read_yaml(path: Path) -> str:
    """Return the text of a YAML file that can be parsed.

    Raises:
        ConfigError: missing, not readable, not text, or not YAML.
    """
    try:
        # It may be a pipe, as in `<(…)`; a named one to which nobody writes is empty, and is not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(MOST_BYTES + 1)
            if not content and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{path}: found a pipe to which nothing was written; give a YAML file")
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{path}: has more than {MOST_BYTES:,} bytes; give a YAML file")
        text = content.decode()
        _check_aliases(text, path)
        _check_numbers(text)
        OmegaConf.create(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    except AssertionError:  # of OmegaConf
        raise ConfigError(f"{path}: found a single value at the top, expected a mapping of keys to values") from None
    except (OmegaConfBaseException, ConfigError):
        raise
    except ValueError as error:  # Python refuses to read integers of more than 4,300 digits
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except _MISFITS as error:
        raise ConfigError(f"{path}: not valid YAML: {_misfit(error)}") from None
    return text


# Errors of PyYAML about a tag that does not fit its value, such as `!!bool x` or `!!timestamp x`.
_MISFITS = (LookupError, AttributeError, TypeError)


def _misfit(error: Exception) -> str:
    return f"a tag (!!…) does not fit its value ({type(error).__name__}: {error}); write the value without a tag"


def _check_aliases(text: str, path: Path) -> None:
    """Refuse aliases (`*name`) of aliases that would make a small file a huge configuration: each one is a copy.

    Raises:
        ConfigError: more than MOST_NODES values, or a value within itself.
    """
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MOST_NODES  # until it is known: a value within itself has no size
            entries = node.value if isinstance(node, yaml.CollectionNode) else []
            below = itertools.chain.from_iterable(entries) if isinstance(node, yaml.MappingNode) else entries
            sizes[id(node)] = 1 + sum(map(size, below))
        return sizes[id(node)]

    if size(yaml.compose(text, yaml.SafeLoader)) > MOST_NODES:
        raise ConfigError(
            f"{path}: has more than {MOST_NODES:,} values, or a value within itself, by aliases (*name); write out "
            "what is meant"
        )


def _check_numbers(text: str) -> None:
    """Refuse numbers to the base 60 or 8, which only YAML 1.1 has: 1:30 would be 90, and 010 would be 8.

    Raises:
        YAMLError: there is such a number.
    """
    for token in yaml.scan(text, yaml.SafeLoader):
        if isinstance(token, yaml.ScalarToken) and token.plain and _OLD_NUMBER.fullmatch(token.value):
            problem = (
                f"found {token.value}, which would be read as {yaml.safe_load(token.value)}; write a decimal number"
            )
            raise yaml.MarkedYAMLError(problem=f"{problem}, or text in quotes", problem_mark=token.start_mark)


def _apply(config: Any, override: str, config_type: type[Config]) -> None:
    """Apply one override; merging all at once cannot reach into lists (data.stages.0.tokens=…)."""
    key, _, text = override.partition("=")
    place = without_credentials(_short(override))
    if (problem := _beside_lists(config, key)) is not None:
        raise ConfigError(f"command line: {place} leads nowhere in the file: {problem}")
    try:
        OmegaConf.update(config, key, _read_value(text, _types_at(config_type, key)), merge=True)
    except YAMLError as error:
        raise ConfigError(f"command line: {place}: the value is not valid YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"command line: {place}: the value is not valid YAML: nested too deeply") from None
    except (OmegaConfBaseException, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"command line: {place} leads nowhere in the file: {reason}") from error
    except ValueError as error:  # Python refuses to read integers of more than 4,300 digits
        raise ConfigError(f"command line: {place}: the value is not valid YAML: {error}") from None


def _beside_lists(config: Any, key: str) -> str | None:
    """Describe the list that an override's key leads to without naming one of its entries; None if there is none."""
    at, above = OmegaConf.to_container(config, resolve=False), ""
    for part in re.split(r"[.\[\]]+", key.rstrip("]")):
        if isinstance(at, list):
            if re.fullmatch(r"\d{1,9}", part) is None or int(part) >= len(at):
                entries = f"has {len(at)}, `{above}.0`" + (f" to `{above}.{len(at) - 1}`" if len(at) > 1 else "")
                return f"{above} is a list, which {entries if at else 'is empty'}; set it whole: `{above}=[…]`"
            at = at[int(part)]
        else:
            at = at.get(part) if isinstance(at, dict) else None
        above = f"{above}.{part}" if above else part
    return None


_NULLS = ("", "~", "null", "Null", "NULL")


def _read_value(text: str, types: Sequence[Any]) -> Any:
    """Read an override for a field of these types: the text as it is for a string, otherwise YAML."""
    if type(None) in types and text in _NULLS:
        return None
    containers = [kind for kind in types if kind not in (str, type(None))]
    is_text = str in types and (not containers or not text.lstrip().startswith(("[", "{")))
    # A field of strings takes one as well, where its validator does: `paths=/corpus/web`.
    is_only_entry = any(str in _entry_types([kind]) for kind in containers) and not text.lstrip().startswith(("[", "{"))
    if is_text or (is_only_entry and text not in _NULLS):
        return _escaped(text)
    return _literal(_parsed(text), types)


def _parsed(text: str) -> Any:
    _check_numbers(text)
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except OmegaConfBaseException:
        raise
    except _MISFITS as error:
        raise YAMLError(_misfit(error)) from None
    assert isinstance(value, dict)
    return value["value"]


def _literal(value: Any, types: Sequence[Any]) -> Any:
    """Return `value` with the text of string fields escaped, so that nothing in it is an interpolation."""
    if isinstance(value, dict):
        return {key: _literal(entry, _types_below(types, str(key))) for key, entry in value.items()}
    if isinstance(value, list):
        return [_literal(entry, _entry_types(types)) for entry in value]
    return _escaped(value) if isinstance(value, str) and str in types else value


def _types_at(config_type: type[Config], key: str) -> list[Any]:
    """Return the types that the field of an override's key may have; none if there is no such field."""
    types: list[Any] = [config_type]
    for part in re.findall(r"[^.\[\]]+", key):
        types = _types_below(types, part)
    return types


def _types_below(types: Sequence[Any], part: str) -> list[Any]:
    fields = [
        kind.model_fields[part].annotation
        for kind in types
        if isinstance(kind, type) and issubclass(kind, Config) and part in kind.model_fields
    ]
    return [member for field in fields for member in _members(field)] + _entry_types(types)


def _entry_types(types: Sequence[Any]) -> list[Any]:
    """Return the types of the entries of lists and of the values of mappings."""
    entries = [get_args(kind)[-1] for kind in types if get_origin(kind) in (list, tuple, dict) and get_args(kind)]
    return [member for entry in entries for member in _members(entry)]


def _members(annotation: Any) -> list[Any]:
    """Return the types of a union, each without its constraints."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _escaped(value: Any) -> Any:
    """Return plain values with each `${` escaped for OmegaConf."""
    if isinstance(value, dict):
        return {key: _escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_escaped(entry) for entry in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _find_interpolations(plain: Any, location: Location = ()) -> dict[Location, str]:
    """Return each value that OmegaConf would resolve, by its location."""
    if isinstance(plain, str) and _INTERPOLATION.search(plain):
        return {location: plain}
    entries = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    return {
        place: text for key, entry in entries for place, text in _find_interpolations(entry, (*location, key)).items()
    }


def _replaced(values: Any, by_location: Mapping[Location, str], location: Location = ()) -> Any:
    """Return plain values with those at some locations replaced."""
    if location in by_location:
        return by_location[location]
    if isinstance(values, dict):
        return {key: _replaced(entry, by_location, (*location, key)) for key, entry in values.items()}
    if isinstance(values, list):
        return [_replaced(entry, by_location, (*location, i)) for i, entry in enumerate(values)]
    return values


def validate(
    config_type: type[ConfigT],
    values: dict[str, Any],
    *,
    where: str,
    overrides: Sequence[str] = (),
    secrets: Mapping[Location, str] | None = None,
) -> ConfigT:
    """Build `config_type` from plain values; every problem becomes one line of the error.

    Args:
        secrets: the interpolations whose values must not be shown, by their location.
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
            lines.append(f"{place}: {_hidden(text, values, secrets or {})}")
        raise ConfigError("\n".join(lines)) from None


def _find_truth_values(values: Any, types: Sequence[Any], location: Location = ()) -> dict[Location, str]:
    """Return the text of each true or false in place of a number: pydantic would take it for 1 or 0.

    Configurations within are left out: each finds its own.
    """
    if isinstance(values, bool):
        return {location: str(values).lower()} if {int, float} & set(types) and bool not in types else {}
    entries = [(i, entry, _entry_types(types)) for i, entry in enumerate(values)] if isinstance(values, list) else []
    if isinstance(values, dict) and (not location or not any(configs_within(kind) for kind in types)):
        entries = [(key, entry, _types_below(types, str(key))) for key, entry in values.items()]
    return {
        place: text
        for key, entry, below in entries
        for place, text in _find_truth_values(entry, below, (*location, key)).items()
    }


def _value_at(values: Any, location: Location) -> Any:
    for part in location:
        values = values[part]
    return values


def _hide_environment(values: Any, interpolations: Mapping[Location, str]) -> None:
    """Have errors of the whole program show these interpolations, not what they brought from the environment."""
    for location, interpolation in interpolations.items():
        value = _value_at(values, location)
        names = re.findall(r"oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)", interpolation)
        if names and isinstance(value, str):
            hide(value, interpolation)
        for name in names:  # errors may be about a part of the value
            hide(os.environ.get(name, ""), f"${{oc.env:{name}}}")


def _hidden(text: str, values: Any, secrets: Mapping[Location, str]) -> str:
    """Return `text` with each secret value replaced by its interpolation."""
    shown: dict[str, str] = {}
    for location, interpolation in secrets.items():
        value = _value_at(values, location)
        for form in (str(value), repr(value), repr(value)[1:-1] if isinstance(value, str) else ""):
            if form:
                shown[form] = interpolation
    for form in sorted(shown, key=len, reverse=True):
        text = text.replace(form, shown[form])
    return text


def _short(value: Any) -> str:
    """Return a value as shown in errors: long ones are cut."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "an integer of more than 4,300 digits"
    return text if len(text) <= 300 else f"{text[:300]}…"


def _is_about(text: str, key: str, override: str) -> bool:
    """Return True if an override caused the problem at `key`: set there, above, or below in a key that `text` names."""
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
            found = problem["input"]
            hint = "; YAML reads yes, no, on and off as true and false, if they have no quotes"
            is_truth_value = isinstance(found, bool) or found in ("true", "false")
            name = f"{key}: " if key else ""
            return f"{name}found {without_credentials(_short(found))}; {problem['msg']}{hint if is_truth_value else ''}"


def _valid_keys(config_type: type[Config], location: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the configuration at `location` below `config_type`."""
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
    """Return the configurations that a field of this type may contain."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [config for argument in get_args(annotation) for config in configs_within(argument)]
