"""Recipes: defaults, and errors for wrong settings."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from prep.config import PrepConfig
from prep.inputs.discovery import find_files
from prep.inputs.hooks import recipe_identity
from streaming_rwkv.config import ConfigError, load_config, validate
from streaming_rwkv.location import LocationError
from streaming_rwkv.tokenizer import load_tokenizer

MINIMAL = "out: o\ntokenizer: rwkv-world\nsources:\n  c4: {paths: corpus/c4}\n"


def test_three_keys_are_enough(tmp_path):
    (tmp_path / "a.yaml").write_text(MINIMAL)
    config = load_config(PrepConfig, tmp_path / "a.yaml", overrides=["workers=3", "edges=[8,16]"])
    assert config.sources["c4"].paths == ["corpus/c4"]
    assert config.sources["c4"].text == "text"
    assert (config.worker_count, config.edges, config.pack_tokens) == (3, [8, 16], 8192)


def test_by_default_there_is_a_worker_for_each_core(tmp_path):
    (tmp_path / "a.yaml").write_text(MINIMAL)
    assert load_config(PrepConfig, tmp_path / "a.yaml").worker_count >= 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pack_token: 9", "a.yaml: pack_token: unknown key; did you mean 'pack_tokens'"),
        ("edges: [512, 256]", r"edges: found \[512, 256\], expected increasing lengths"),
        ("edges: []", "expected increasing lengths"),
        ("edges: [9000]", "the largest is 9000, but a pack holds pack_tokens=8192"),
        ("validation: 1.5", "validation: found 1.5"),
        ("long_documents: cut", "long_documents: found 'cut'.*'split', 'truncate' or 'drop'"),
        ("sources: {}", "sources: found {}"),
        ("sources: {../up: {paths: x}}", "found '../up', expected a folder name"),
        (f"sources: {{{'x' * 129}: {{paths: x}}}}", "expected a folder name: letters, .*, at most 128"),
        ("sources: {a: {paths: []}}", "sources.a.paths"),
        ("sources: {a: {paths: x, txet: y}}", "sources.a.txet: unknown key; did you mean 'text'"),
        ("sources: {a: {paths: x, filter: nope}}", "found 'nope', expected module:function"),
    ],
)
def test_a_wrong_value_names_its_key(tmp_path, line, message):
    text = MINIMAL.partition("sources:")[0] if line.startswith("sources") else MINIMAL
    (tmp_path / "a.yaml").write_text(text + line)
    with pytest.raises(ConfigError, match=message):
        load_config(PrepConfig, tmp_path / "a.yaml")


def test_locations_and_workers_do_not_change_the_identity(tmp_path):
    (tmp_path / "a.yaml").write_text(MINIMAL)
    plain = load_config(PrepConfig, tmp_path / "a.yaml")
    elsewhere = load_config(
        PrepConfig, tmp_path / "a.yaml", overrides=["out=p", "workers=9", "on_error=stop", "sources.c4.paths=moved"]
    )
    other = load_config(PrepConfig, tmp_path / "a.yaml", overrides=["seed=18"])
    assert recipe_identity(plain) == recipe_identity(elsewhere) != recipe_identity(other)


@pytest.mark.parametrize("folder", ["~nobody-has-this-name/data", "~nobody-has-this-name"])
def test_a_home_folder_that_does_not_exist_is_refused_by_name(folder: str) -> None:
    config = validate(PrepConfig, {"out": folder, "tokenizer": "t", "sources": {"web": {"paths": ["a"]}}}, where="here")
    with pytest.raises(LocationError) as caught:
        _ = config.folder
    assert str(caught.value) == f"{folder}: has no home folder for ~; set HOME, or write the whole path"
    with pytest.raises(LocationError):
        load_tokenizer(folder)
    with pytest.raises(LocationError):
        find_files("web", [f"{folder}/*.jsonl"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a passwd entry")
def test_a_user_without_a_home_folder_is_told_what_to_set() -> None:
    program = (
        "import os\n"
        "from prep.config import PrepConfig\n"
        "from streaming_rwkv.location import LocationError\n"
        "os.setuid(54321)\n"
        "config = PrepConfig(out='s3://bucket/data', tokenizer='t', sources={'web': {'paths': ['a']}})\n"
        "try:\n    config.folder\nexcept LocationError as error:\n    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == "~/.cache: has no home folder for ~; set HOME, or write the whole path\n", result.stderr
