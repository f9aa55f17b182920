"""The command line, as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prep.__main__ import command_parser, main
from prep.build import build
from prep.config import PrepConfig
from streaming_rwkv.arguments import parse_with_overrides
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


def test_a_data_set_is_built_verified_and_inspected(recipe, tmp_path, capsys):
    assert main(["build", recipe, "seed=3"]) == 0
    assert "fingerprint" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "OK; 1 streams, 1 packs" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out"), "--count", "1", "--skip", "1"]) == 0
    shown = capsys.readouterr().out
    assert "train/corpus/1-256 pack 0 document" in shown
    assert ("⟨bos⟩床前明月光⟨eos⟩" in shown) != ("⟨bos⟩hello world⟨eos⟩" in shown)
    assert main(["build", recipe, "seed=3"]) == 0
    again = capsys.readouterr().out
    assert "already finished, nothing to do" in again
    assert main(["show", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[:8] == again.splitlines()[1:9]


def test_inspect_draws_searches_and_shows_ids(recipe, tmp_path, capsys):
    assert main(["build", recipe]) == 0
    capsys.readouterr()

    def shown(*options: str) -> str:
        assert main(["inspect", str(tmp_path / "out"), *options]) == 0
        return capsys.readouterr().out

    assert sorted(shown().splitlines()) == sorted(shown("--in-order").splitlines())
    assert shown("--seed", "3") == shown("--seed", "3")
    found = shown("--grep", "HELLO", "--ids").splitlines()
    assert found[1] == "⟨bos⟩hello world⟨eos⟩"
    assert found[2].startswith("ids 0 ")
    assert len(found) == 3
    assert main(["inspect", str(tmp_path / "out"), "--grep", "nowhere"]) == 0
    assert "no document with 'nowhere'" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out"), "--skip", "100"]) == 0
    assert "no document after the first 100" in capsys.readouterr().err


def test_a_dry_run_shows_a_table(recipe, tmp_path, capsys):
    assert main(["build", recipe, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "1-256" not in shown
    assert shown.endswith("next: the same command without --dry-run\n")
    assert main(["build", recipe, "--dry-run", "--by", "bucket"]) == 0
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
    ("name", "why"),
    [("folder", "is not empty; choose another `--to`"), ("file", "this folder of the tokenizer cannot")],
)
def test_a_tokenizer_is_not_trained_over_existing_files(recipe, tmp_path, capsys, monkeypatch, name, why):
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "folder" / "tokenizer_config.json", tmp_path / "file"):
        file.write_text('{"eos_token": "</s>"}')
    monkeypatch.setattr("prep.commands.train_tokenizer.read_unit", None)  # nothing is read before the error
    assert main(["train-tokenizer", recipe, "--vocab-size", "260", "--to", str(tmp_path / name)]) == 1
    assert f"{tmp_path / name}: {why}" in capsys.readouterr().err
    assert (tmp_path / "folder" / "tokenizer_config.json").read_text() == '{"eos_token": "</s>"}'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "{recipe}", "sede=3"], "error: command line: sede: unknown key; did you mean 'seed'?"),
        (["build", "{recipe}", "seed"], "error: command line: 'seed' is not an override; write key=value"),
        (
            ["train-tokenizer", "{recipe}", "sources.corpus.text=body", "--vocab-size", "300", "--to", "{folder}/bpe"],
            "sources.corpus: no 'body' in the first 3 records of {folder}/corpus/a.jsonl; their keys are 'text'",
        ),
        (["build", "{tiny}"], "tiny_cpu.yaml: this is a training YAML, not a recipe of a data set; train with `stream"),
        (["build", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
        (["build", "{recipe}", "tokenizer=/no/where"], "error: tokenizer '/no/where': no such file or folder"),
        (["verify", "{folder}"], "no manifest, so no finished data set here"),
        (["train-tokenizer", "{recipe}", "--vocab-size", "9", "--to", "x"], "found 9, expected at least 257"),
        (
            ["train-tokenizer", "{recipe}", "--vocab-size", "260", "--to", "{recipe}/bpe"],
            "recipe.yaml/bpe: this folder of the tokenizer cannot be made or written to (Not a directory); fix "
            "that, or name another with `--to FOLDER`",
        ),
    ],
)
def test_errors_are_one_line_and_exit_1(recipe, tmp_path, capsys, arguments, message):
    tiny = YAMLS.parent / "tiny_cpu.yaml"
    filled = [argument.format(recipe=recipe, folder=tmp_path, tiny=tiny) for argument in arguments]
    assert main(filled) == 1
    assert message.format(folder=tmp_path) in capsys.readouterr().err


def test_overrides_may_come_after_options(recipe, tmp_path):
    assert main(["build", recipe, "--dry-run", f"out={tmp_path}/other"]) == 0
    to = tmp_path / "bpe"
    arguments = ["seed=3", "--vocab-size", "260", "edges=[128]", "--to", str(to), "validation=0.1", "seed=4"]
    assert main(["train-tokenizer", recipe, *arguments]) == 0
    parsed = parse_with_overrides(command_parser(), ["train-tokenizer", recipe, *arguments])
    assert parsed.overrides == ["seed=3", "edges=[128]", "validation=0.1", "seed=4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("build x.yaml --dryrun out=x", "unrecognized arguments: --dryrun"),
        ("build x.yaml --dry-run out=x --nope", "unrecognized arguments: --nope"),
        ("verify out --nope x=y", "unrecognized arguments: --nope x=y"),
        ("inspect out --skip -1", "argument --skip: found '-1', expected a whole number, at least 0"),
        ("inspect out --count x", "argument --count: found 'x', expected a whole number, at least 0"),
        ("convert in out --workers 99999", "found '99999', expected a whole number, at least 1 and at most 1,024"),
        ("convert in out --workers 0", "argument --workers: found '0', expected a whole number, at least 1"),
        ("convert in s3://b/out", "argument to: found 's3://b/out', expected a local path"),
        ("report out --to s3://b/out", "argument --to: found 's3://b/out', expected a local path"),
        ("train-tokenizer x.yaml --vocab-size 300 --to s3://b/t", "argument --to: found 's3://b/t', expected a local"),
        ("train-tokenizer x.yaml --vocab-size 300 --to t --most-bytes 0", "argument --most-bytes: found '0', expected"),
        (
            "train-tokenizer x.yaml --vocab-size 300 --to t --most-bytes 1x",
            "argument --most-bytes: found '1x'; expected a number of bytes, or one with kb, mb, gb or tb",
        ),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["build {recipe}", "verify {out}", "inspect {out}", "report {out}"])
def test_errors_of_the_file_system_name_the_file(recipe, tmp_path, capsys, command):
    (tmp_path / "out" / "manifest.json").mkdir(parents=True)
    assert main(command.format(recipe=recipe, out=tmp_path / "out").split()) == 1
    expected = "found a folder, expected a regular file of at most 1,073,741,824 bytes; restore it"
    assert capsys.readouterr().err == f"error: {tmp_path}/out/manifest.json: {expected}\n"


@pytest.mark.parametrize(
    "command",
    [
        "upload {0} s3://b/x",
        "upload out {0}",
        "inspect {0}",
        "verify {0}",
        "report {0}",
        "report out --to {0}",
        "convert {0} to",
        "convert in {0}",
        "train-tokenizer recipe.yaml --vocab-size 300 --to {0}",
    ],
)
def test_arguments_that_are_no_locations_are_named_without_secrets(capsys, command):
    for location, expected in (
        ("gs://bucket/x", "gs://bucket/x: scheme 'gs' is not supported"),
        ("s3://AKIA:pa55word@bucket/x", "s3://…: holds a user name or a password"),
        ("sftp://u:pa55word@host/x", "sftp://…: holds a user name or a password"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(command.format(location).split())
        assert caught.value.code == 2
        shown = capsys.readouterr().err
        assert expected in shown
        assert "55word" not in shown


@pytest.mark.parametrize("key", ["out", "work", "tokenizer", "sources.corpus.paths"])
def test_settings_that_are_no_locations_are_named_without_secrets(recipe, capsys, key):
    for location in ("gs://pa55word@bucket/x", "s3://AKIA:pa/55word@bucket/x"):
        assert main(["build", recipe, f"{key}={location}", *(["out=s3://b/x"] if key == "work" else [])]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: command line: {key}: {location[:2]}://…: holds a user name or a password")
        assert "55word" not in shown


def test_a_hook_with_a_syntax_error_is_named(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "hooks_with_a_slip.py").write_text("x = 1\ndef keep(record) return True\n")
    monkeypatch.syspath_prepend(tmp_path)
    for more in ([], ["--dry-run"]):
        assert main(["build", recipe, "sources.corpus.filter=hooks_with_a_slip:keep", *more]) == 1
        assert f"hook 'hooks_with_a_slip:keep': {tmp_path}/hooks_with_a_slip.py, line 2: " in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", [f"{number:04}" * 50 for number in range(3000)])
    build(config())
    command = [sys.executable, "-m", "prep", "inspect", str(tmp_path / "out"), "--count", "3000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shown:
        assert shown.stdout.readline().startswith("── train/corpus".encode())
        shown.stdout.close()
        assert shown.stderr.read() == b""
    assert shown.returncode == 141


def test_inspect_names_the_streams_that_exist(recipe, tmp_path, capsys):
    main(["build", recipe])
    assert main(["inspect", str(tmp_path / "out"), "--source", "nope"]) == 1
    assert "no stream train/nope/*; train has the sources corpus and the buckets 1-256" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(file.name for file in YAMLS.glob("*.yaml")))
def test_the_yamls_that_come_with_the_project_are_valid(name):
    load_config(PrepConfig, YAMLS / name)


def test_workers_import_nothing_heavy():
    """`import streaming` alone would cost each of them 5 seconds and 600 MB."""
    program = (
        "import sys, prep.build, prep.execution.engine, prep.execution.progress, prep.__main__\n"
        "heavy = {'torch', 'streaming', 'composer', 'transformers', 'datasets', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=250)


@pytest.mark.parametrize("out", ["/dev/null/x", "/proc/x", "/", "{tmp_path}/corpus", "{tmp_path}/a/../corpus/x"])
def test_a_dry_run_refuses_a_place_that_the_build_refuses(out, recipe, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    arguments = ["build", recipe, f"out={out.format(tmp_path=tmp_path)}"]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert main([*arguments, "--dry-run"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == error


def test_a_dry_run_refuses_the_place_of_another_build(recipe, tmp_path, capsys):
    assert main(["build", recipe]) == 0
    assert main(["build", recipe, "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["build", recipe, "seed=5", "--dry-run"]) == 1
    assert f"error: {tmp_path}/out: holds a finished data set, and since it began" in capsys.readouterr().err
