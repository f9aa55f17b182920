"""Values of overrides and of the environment: texts stay as they are, and no secret is saved or shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from streaming_rwkv.config import Config, ConfigError, LoadedConfig, load_config
from streaming_rwkv.console import print_error
from streaming_rwkv.errors import UserError

SECRET = "SeCrEtKeY/0123"


class Source(Config):
    paths: list[str] = Field(default=[])
    text: str = "text"


class Run(LoadedConfig):
    seed: int = 17
    folder: str = "runs/a"
    remote: str | None = None
    prompts: list[str] = Field(default=[])
    sources: dict[str, Source] = Field(default={})


def load(tmp_path: Path, text: str, *overrides: str) -> Run:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(Run, path, overrides=overrides)


@pytest.mark.parametrize(
    "text", ["/x/my run #1", "x: y", "a, b", "${x}", "$HOME/${", "[draft", "'quoted'", "1e3", "no", " x "]
)
def test_the_text_of_an_override_is_the_value_of_a_string(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, "{}", f"folder={text}").folder == text
    assert load(tmp_path, "{}", f"sources.web.text={text}").sources["web"].text == text
    assert load(tmp_path, "prompts: [a]", f"prompts.0={text}").prompts == [text]


@pytest.mark.parametrize("null", ["null", "~", ""])
def test_an_optional_string_can_be_unset(tmp_path: Path, null: str) -> None:
    assert load(tmp_path, "remote: s3://bucket/x", f"remote={null}").remote is None


def test_code_in_a_prompt_is_text(tmp_path: Path) -> None:
    assert load(tmp_path, "{}", r'prompts=["print(f\"${x}\")", "b"]').prompts == ['print(f"${x}")', "b"]
    assert load(tmp_path, "{}", "sources={web: {text: '${x}', paths: ['${y}']}}").sources == {
        "web": Source(text="${x}", paths=["${y}"])
    }


def test_a_number_is_still_read_as_yaml_and_may_refer_to_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, "seed: 3", "seed=0x10").seed == 16


@given(text=st.text(alphabet="\\${}a #'\"\n:", max_size=12))
def test_a_saved_configuration_is_read_as_itself(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    config = Run(folder=text, prompts=[text, "b"])
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(Run, path) == config


def test_a_value_of_the_environment_is_saved_as_its_interpolation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", SECRET)
    config = load(
        tmp_path, "folder: /x/${oc.env:KEY}\nprompts: [a, '${folder}']\nsources: {web: {text: '${oc.env:KEY}'}}"
    )
    assert (config.folder, config.prompts[1], config.sources["web"].text) == (f"/x/{SECRET}", f"/x/{SECRET}", SECRET)
    assert SECRET not in config.to_yaml()
    assert config.with_interpolations(config.model_dump()) == {
        "seed": 17,
        "folder": "/x/${oc.env:KEY}",
        "remote": None,
        "prompts": ["a", "${folder}"],
        "sources": {"web": {"paths": [], "text": "${oc.env:KEY}"}},
    }
    assert load(tmp_path, config.to_yaml()) == config


@pytest.mark.parametrize(
    "text",
    [
        "seed: ${oc.env:KEY}",
        "seed: ${oc.decode:'${oc.env:KEY}'}",
        "seed: 1${oc.env:KEY}",
        "folder: {a: '${oc.env:KEY}'}",
        "prompts: ${oc.env:KEY}",
        "sources: {web: ['${oc.env:KEY}']}",
        "seed: ${oc.decode:'[${oc.env:KEY}'}",
    ],
)
def test_no_error_shows_a_value_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KEY", SECRET)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert "SeCrEt" not in str(caught.value)


def test_a_file_that_is_no_yaml_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"seed: 1\nfolder: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: not UTF-8 \(byte 16\); save it as UTF-8"):
        load_config(Run, file)
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); give a YAML file"):
        load_config(Run, tmp_path)
    for digits in ("9" * 5000, "0x" + "f" * 5000):
        with pytest.raises(ConfigError, match=r"run\.yaml: .*4,?300 digits"):
            load(tmp_path, f"prompts: {digits}")
        with pytest.raises(ConfigError, match=r"command line: .*4,?300 digits"):
            load(tmp_path, "{}", f"sources={digits}")


def test_an_interpolation_that_cannot_be_resolved_is_shown_as_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: folder: \$\{oc\.env:NO_SUCH_VARIABLE\} cannot be resolved"):
        load(tmp_path, "folder: ${oc.env:NO_SUCH_VARIABLE}")


def test_errors_of_the_whole_program_hide_values_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streaming_rwkv.errors._from_environment", {})
    monkeypatch.setenv("KEY", "s3cret-s3cret")
    load(tmp_path, "folder: /x/${oc.env:KEY}")
    print_error(UserError("/x/s3cret-s3cret/manifest.json: missing"))
    assert capsys.readouterr().err == "error: /x/${oc.env:KEY}/manifest.json: missing\n"
    print_error(UserError("No module named 's3cret-s3cret'"))
    assert capsys.readouterr().err == "error: No module named '${oc.env:KEY}'\n"


def test_a_pipe_without_a_writer_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"run\.yaml: found a pipe to which nothing was written; give a YAML file"):
        load_config(Run, tmp_path / "run.yaml")
