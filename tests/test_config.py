"""A configuration error says where, what was found, and what is meant by it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from pydantic import Field, model_validator

from streaming_rwkv.config import Config, ConfigError, load_config


class Stream(Config):
    path: str
    proportion: float = 1.0


class Data(Config):
    streams: list[Stream] = Field(min_length=1)
    workers: int = 2
    most_workers: int = 9

    @model_validator(mode="after")
    def _few(self) -> Data:
        if self.workers > self.most_workers:
            raise ValueError(f"workers: found {self.workers}, above most_workers {self.most_workers}")
        return self


class Run(Config):
    seed: int = 17
    data: Data


YAML = """\
seed: 3
data:
  streams:
    - path: a
    - path: b
      proportion: 0.5
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def errors(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, with the file's name for its whole path."""
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path, overrides=overrides)
    return str(caught.value).replace(str(path), path.name).splitlines()


def test_a_file_is_read_with_its_overrides(path: Path) -> None:
    config = load_config(Run, path, overrides=["seed=4", "data.workers=0", "data.streams.1.proportion=0.25"])
    assert config == Run(seed=4, data=Data(streams=[Stream(path="a"), Stream(path="b", proportion=0.25)], workers=0))


def test_an_override_can_replace_a_list(path: Path) -> None:
    config = load_config(Run, path, overrides=["data.streams=[{path: c, proportion: 2}]"])
    assert config.data.streams == [Stream(path="c", proportion=2)]


def test_the_last_override_counts_and_a_value_may_hold_an_equals_sign(path: Path) -> None:
    config = load_config(Run, path, overrides=["seed=1", "seed=2", "data.streams.0.path=s3://b/x?a=1"])
    assert (config.seed, config.data.streams[0].path) == (2, "s3://b/x?a=1")


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("sede", "sede: unknown key; did you mean 'seed'?"),
        ("data.wrokers", "data.wrokers: unknown key; did you mean 'workers'?"),
        ("data.streams.1.proprtion", "data.streams.1.proprtion: unknown key; did you mean 'proportion'?"),
        ("data.streams.0.qqq", "data.streams.0.qqq: unknown key; allowed here: path, proportion"),
        ("qqq", "qqq: unknown key; allowed here: data, seed"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(path: Path, key: str, error: str) -> None:
    assert errors(path, f"{key}=1") == [f"command line: {error}"]


def test_an_unknown_key_in_the_file_is_named_with_the_file(path: Path) -> None:
    path.write_text(YAML.replace("proportion", "proprtion"))
    assert errors(path) == ["run.yaml: data.streams.1.proprtion: unknown key; did you mean 'proportion'?"]


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("data.workers=10", "command line"),
        ("data.most_workers=1", "command line"),
        ("data={streams: [{path: a}], workers: 10}", "command line"),
        ("data.streams.0.path=workers", "run.yaml"),
        ("seed=10", "run.yaml"),
    ],
)
def test_a_conflict_of_settings_is_reported_where_one_of_them_was_given(path: Path, override: str, place: str) -> None:
    in_file = 10 if place == "run.yaml" else 2
    path.write_text(YAML + f"  workers: {in_file}\n")
    (line,) = errors(path, override)
    assert line.startswith(f"{place}: data: workers: found ")


def test_every_problem_has_its_line(path: Path) -> None:
    path.write_text("seed: x\ndata: {streams: [{proportion: 1}], wokers: 2}\n")
    assert errors(path) == [
        "run.yaml: seed: found 'x'; Input should be a valid integer, unable to parse string as an integer",
        "run.yaml: data.streams.0.path: required, but not given",
        "run.yaml: data.wokers: unknown key; did you mean 'workers'?",
    ]


@pytest.mark.parametrize(
    ("value", "read"), [("1:30", "90"), ("-1:30:00", "-5400"), ("0:30.5", "30.5"), ("010", "8"), ("-0_17", "-15")]
)
def test_numbers_to_the_base_60_or_8_are_refused(path: Path, value: str, read: str) -> None:
    problem = f"not valid YAML: found {value}, which would be read as {read}; write a decimal number, or text in quotes"
    assert errors(path, f"seed={value}")[0].endswith(problem)
    path.write_text(YAML.replace("seed: 3", f"seed: {value}"))
    assert errors(path)[0] == f"run.yaml: {problem}"
    path.write_text(YAML.replace("path: a", f"path: '{value}'"))
    assert load_config(Run, path, overrides=[f"data.streams.1.path={value}"]).data.streams[1].path == value


@pytest.mark.parametrize("value", ["yes", "off", "true"])
def test_a_truth_value_is_neither_a_number_nor_a_text(path: Path, value: str) -> None:
    found = str(value != "off")
    hint = "YAML reads yes, no, on and off as true and false, if they have no quotes"
    path.write_text(YAML.replace("3", value).replace("0.5", value).replace("path: a", f"path: {value}"))
    assert errors(path) == [
        f"run.yaml: seed: found {found.lower()!r}; Input should be a valid integer, unable to parse string as an "
        f"integer; {hint}",
        f"run.yaml: data.streams.0.path: found {found}; Input should be a valid string; {hint}",
        f"run.yaml: data.streams.1.proportion: found {found.lower()!r}; Input should be a valid number, unable to "
        f"parse string as a number; {hint}",
    ]
    path.write_text(YAML)
    assert errors(path, f"data.workers={value}")[0].startswith(f"command line: data.workers: found {found.lower()!r}; ")


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_numbers_are_finite(path: Path, value: str) -> None:
    (line,) = errors(path, f"data.streams.0.proportion={value}")
    assert line.startswith("command line: data.streams.0.proportion: found ")


@pytest.mark.parametrize("override", ["seed", "=3", "--seed"])
def test_a_malformed_override_is_refused(path: Path, override: str) -> None:
    assert errors(path, override) == [f"command line: {override!r} is not an override; write key=value, e.g. seed=17"]


@pytest.mark.parametrize(
    "key",
    [
        "data.streams.7.path",
        "data.streams.-1.path",
        "data.streams.first.path",
        "data.streams.7",
        "data.streams.",
        "data.streams[2].path",
    ],
)
def test_an_override_that_leads_nowhere_is_refused(path: Path, key: str) -> None:
    (line,) = errors(path, f"{key}=x")
    assert line == (
        f"command line: '{key}=x' leads nowhere in the file: data.streams is a list, which has 2, `data.streams.0` to "
        "`data.streams.1`; set it whole: `data.streams=[…]`"
    )


def test_an_override_that_is_not_yaml_is_refused(path: Path) -> None:
    assert errors(path, "seed=[1")[0].startswith("command line: 'seed=[1': the value is not valid YAML: ")


def test_a_key_below_a_plain_value_is_refused(path: Path) -> None:
    assert errors(path, "seed.a=1")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert errors(tmp_path / "none.yaml") == ["none.yaml: no such file"]


@pytest.mark.parametrize("content", ["a: [1, 2", "a: 1\n  b: 2\n", "\tseed: 3\n"])
def test_a_file_that_is_not_yaml_is_named(path: Path, content: str) -> None:
    path.write_text(content)
    assert errors(path)[0].startswith("run.yaml: not valid YAML: ")


@pytest.mark.parametrize("value", ["!!bool maybe", "!!timestamp noon", "!!int ''", "!!float ''"])
def test_a_value_that_does_not_fit_its_tag_is_named(path: Path, value: str) -> None:
    path.write_text(f"seed: {value}\n")
    assert errors(path)[0].startswith("run.yaml: not valid YAML: ")
    path.write_text(YAML)
    assert errors(path, f"seed={value}")[0].startswith(
        f"command line: {f'seed={value}'!r}: the value is not valid YAML: "
    )


NESTED = ["a: &a [x, x, x, x, x, x, x, x, x]"]
NESTED += [f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]" for before, after in itertools.pairwise("abcdefg")]


@pytest.mark.parametrize("lines", [NESTED, ["a: &a [*a]"], ["a: &a {b: *a}"]], ids=["wide", "list", "mapping"])
def test_a_small_file_cannot_become_a_huge_configuration(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines))
    (line,) = errors(path)
    assert line.startswith("run.yaml: has more than 100,000 values, or a value within itself, by aliases (*name)")


def test_an_alias_is_read(path: Path) -> None:
    path.write_text("data: {streams: [&a {path: a}, *a]}\n")
    assert load_config(Run, path).data.streams == [Stream(path="a")] * 2


def test_interpolations_within_interpolations_end(path: Path) -> None:
    path.write_text("seed: '" + "${" * 1000 + "x" + "}" * 1000 + "'\n")
    assert errors(path)[0].startswith("run.yaml: ")


def test_a_file_without_keys_is_refused(path: Path) -> None:
    path.write_text("- 1\n- 2\n")
    assert errors(path) == ["run.yaml: found a list at the top, expected a mapping of keys to values"]


def test_an_empty_file_misses_what_is_required(path: Path) -> None:
    path.write_text("")
    assert errors(path) == ["run.yaml: data: required, but not given"]


def test_an_interpolation_of_a_missing_key_is_a_configuration_error(path: Path) -> None:
    path.write_text(YAML.replace("seed: 3", "seed: ${nowhere}"))
    assert errors(path)[0].startswith("run.yaml: ")


def test_a_configuration_cannot_be_changed_later(path: Path) -> None:
    config = load_config(Run, path)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 4  # type: ignore[misc]
