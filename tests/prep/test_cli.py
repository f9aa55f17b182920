"""The command line, as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prep.__main__ import main
from prep.config import PrepConfig
from streaming_rwkv.config import load_config
from streaming_rwkv.tokenizer import load_tokenizer

YAMLS = Path(__file__).parents[2] / "yamls" / "prep"


@pytest.fixture
def recipe(tmp_path, tokenizer_folder, write_lines) -> str:
    write_lines(tmp_path / "corpus" / "a.jsonl", ["hello world", "床前明月光", "hello world"])
    values = {
        "out": str(tmp_path / "out"),
        "tokenizer": str(tokenizer_folder),
        "sources": {"corpus": {"paths": str(tmp_path / "corpus")}},
        "workers": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "recipe.yaml")


def test_build_verify_inspect(recipe, tmp_path, capsys):
    assert main(["build", recipe, "seed=3"]) == 0
    assert "fingerprint" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "whole; 1 streams, 1 packs" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out"), "--count", "1", "--skip", "1"]) == 0
    shown = capsys.readouterr().out
    assert "train/corpus/1-256 pack 0 document" in shown
    assert ("⟨bos⟩床前明月光⟨eos⟩" in shown) != ("⟨bos⟩hello world⟨eos⟩" in shown)
    assert main(["build", recipe, "seed=3"]) == 0
    assert "already finished, nothing to do" in capsys.readouterr().out


def test_a_dry_run_shows_a_table(recipe, tmp_path, capsys):
    assert main(["build", recipe, "--dry-run"]) == 0
    assert "1-256" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_trained_on_the_sources(recipe, tmp_path, capsys):
    to = tmp_path / "bpe"
    assert main(["train-tokenizer", recipe, "--vocab-size", "260", "--to", str(to)]) == 0
    assert f"use it with tokenizer={to}" in capsys.readouterr().out
    trained = load_tokenizer(to)
    assert trained.vocab_size == 260
    assert trained.bos_id == trained.eos_id
    assert trained.decode(trained.encode("any ünicode \x00🎉")) == "any ünicode \x00🎉"
    assert len(trained.encode("hello")) < 5
    assert main(["build", recipe, f"tokenizer={to}"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "{recipe}", "sede=3"], "error: command line: sede: unknown key; did you mean 'seed'?"),
        (["build", "{recipe}", "seed"], "error: command line: 'seed' is not an override; write key=value"),
        (["build", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
        (["build", "{recipe}", "tokenizer=/no/where"], "error: tokenizer '/no/where': no such file or folder"),
        (["verify", "{folder}"], "no manifest, so no finished data set here"),
        (["train-tokenizer", "{recipe}", "--vocab-size", "9", "--to", "x"], "at least 257 are needed"),
    ],
)
def test_errors_are_one_line_and_exit_1(recipe, tmp_path, capsys, arguments, message):
    filled = [argument.format(recipe=recipe, folder=tmp_path) for argument in arguments]
    assert main(filled) == 1
    assert message in capsys.readouterr().err


def test_inspect_says_what_there_is(recipe, tmp_path, capsys):
    main(["build", recipe])
    assert main(["inspect", str(tmp_path / "out"), "--source", "nope"]) == 1
    assert "no stream train/nope/*; it has train/corpus/1-256" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(file.name for file in YAMLS.glob("*.yaml")))
def test_the_yamls_that_come_with_the_project_are_valid(name):
    load_config(PrepConfig, YAMLS / name)


def test_workers_import_nothing_heavy():
    """`import streaming` alone would cost each of them 5 seconds and 600 MB."""
    program = (
        "import sys, prep.pipeline, prep.engine, prep.progress, prep.__main__\n"
        "heavy = {'torch', 'streaming', 'composer', 'transformers', 'datasets', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=250)
