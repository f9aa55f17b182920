"""Exported folders, as other programs read them."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from streaming_rwkv.config import UserError
from streaming_rwkv.filesystem import sole_writer
from streaming_rwkv.inference import command_line
from streaming_rwkv.inference.export import export, how_to_load, model_card
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.model.state import model_state
from streaming_rwkv.model.weights import Layout, write_pth
from streaming_rwkv.outputs import CHECKPOINTS, MARK_NAME
from streaming_rwkv.shards import MANIFEST_NAME
from streaming_rwkv.tokenizer import load_tokenizer

TEXTS = [
    "",
    "Today is a beautiful day. 今天是美好的一天。",
    "  two  spaces\n\n\nand lines\r\n\ttabs ",
    "🎉👩‍👩‍👧 é e\u0301 \u202eright to left नमस्ते 🦤",
    "\x00\x01\x7f\ufeff\ufffd \u2028 ÿþ Ã©",
    "<|endoftext|> spelled out, <s> <|endoftext|>",
    "b'\\xff' don't . , ! ?",
    "a" * 300,
]

PROGRAM = """
import json, sys
from transformers import AutoTokenizer
folder, again, texts = sys.argv[1], sys.argv[2], json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokenizer.save_pretrained(again)
both = [tokenizer, AutoTokenizer.from_pretrained(again, trust_remote_code=True)]
print(json.dumps([
    [[t.encode(text) for text in texts], t(texts)["input_ids"], [t.decode(t.encode(text)) for text in texts],
     t.decode([0, 33520, 0]), t.decode([0, 33520, 0], skip_special_tokens=True), t.eos_token_id, t.bos_token_id, len(t)]
    for t in both
]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a World model."""
    place = tmp_path_factory.mktemp("export")
    model = RWKV7(RWKV7Config(vocab_size=65536, hidden_size=64, num_layers=1))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    write_pth(model_state(model), place / "w.pth")
    export(place / "w.pth", place / "hf", dtype=torch.bfloat16, tokenizer=load_tokenizer("rwkv-world"))
    return place / "hf"


@pytest.mark.slow
def test_transformers_gives_world_ids_from_an_exported_folder(folder: Path, tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "again")],
        env=environment, input=json.dumps(TEXTS), capture_output=True, text=True, timeout=280, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    world = load_tokenizer("rwkv-world")
    expected = [world.encode(text).tolist() for text in TEXTS]
    for ids, batch, texts, shown, skipped, eos, bos, size in json.loads(done.stdout):
        assert ids == expected
        assert batch == expected
        assert texts == TEXTS
        assert shown == "<|endoftext|>Today<|endoftext|>"
        assert skipped == "Today"
        assert (eos, bos) == (0, 0)
        assert size == 65530  # of 65,536 rows; the last six have no token


def test_an_exported_folder_is_still_the_world_tokenizer_here(folder: Path) -> None:
    assert load_tokenizer(folder).record() == load_tokenizer("rwkv-world").record()


def test_all_files_have_the_mode_of_any_new_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    expected = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    assert {name: stat.S_IMODE((folder / name).stat().st_mode) for name in os.listdir(folder)} == dict.fromkeys(
        os.listdir(folder), expected
    )


def test_a_folder_says_what_it_is_and_how_it_is_loaded(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "1 layers of 64, vocabulary 65,536, weights in bfloat16" in card
    assert 'AutoTokenizer.from_pretrained(".", trust_remote_code=True)' in card
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 0)


@pytest.mark.parametrize(("name", "found"), [("hf", "hf/model.safetensors"), ("w2.pth", "w2.pth")])
def test_an_export_is_replaced_only_on_request(
    folder: Path, tmp_path: Path, name: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder.parent / "w.pth"), str(tmp_path / name)]
    assert command_line.export(arguments) == 0
    shown = capsys.readouterr().out
    assert "MB, bfloat16" in shown
    assert "load it with: " in shown
    assert command_line.export(arguments) == 1
    expected = f"error: {tmp_path / found}: exists already; name another place, or replace it with --overwrite\n"
    assert capsys.readouterr().err.endswith(expected)
    assert command_line.export([*arguments, "--overwrite"]) == 0


def test_an_export_replaces_links_and_does_not_follow_them(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for file in folder.iterdir():
        (tmp_path / "hf" / file.name).symlink_to(tmp_path / f"outside-{file.name}")
    assert command_line.export([str(folder), str(tmp_path / "hf"), "--tokenizer", "rwkv-world"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("name", ["m.pth", "m.gguf", "m"])
def test_a_place_that_cannot_be_written_is_named(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / name, tmp_path / f"{'x' * 300}{name}"):
        assert command_line.export([str(folder), str(out)]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"error: {tmp_path}/")
        assert "cannot be " in last


@pytest.mark.parametrize("name", ["m.pth", "m.gguf", "m"])
def test_a_disk_without_room_is_named(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert command_line.export([str(folder), str(tmp_path / "out" / name)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'out'}/")
    assert "cannot be written (File too large); " in last


@pytest.mark.parametrize(
    ("name", "layout", "line"),
    [
        ("m.pth", "fla", "streaming-rwkv generate m.pth PROMPT --tokenizer NAME, or `rwkv`"),
        ("m.gguf", "fla", "llama-cli -m m.gguf -p PROMPT"),
        ("m", "fla", "import fla; AutoModelForCausalLM.from_pretrained('m'); see its README.md"),
        ("m", "transformers", "AutoModelForCausalLM.from_pretrained('m'); see its README.md"),
    ],
)
def test_each_format_is_loaded_in_its_way(name: str, layout: Layout, line: str) -> None:
    assert how_to_load(Path(name), layout=layout) == f"load it with: {line}"


def test_a_self_contained_folder_is_loaded_with_its_code() -> None:
    expected = "load it with: AutoModelForCausalLM.from_pretrained('m', trust_remote_code=True); see its README.md"
    assert how_to_load(Path("m"), self_contained=True) == expected


def test_only_the_layout_of_fla_needs_fla() -> None:
    state = model_state(RWKV7(RWKV7Config(vocab_size=16, hidden_size=64, num_layers=1)))
    cards = {
        layout: model_card(state, dtype=torch.bfloat16, tokenizer=None, layout=layout) for layout in get_args(Layout)
    }
    assert "import fla" in cards["fla"]
    assert "import fla" not in cards["transformers"]
    assert "AutoTokenizer" not in cards["fla"]


@pytest.mark.parametrize(
    ("marks", "kind"),
    [(CHECKPOINTS, "a training run"), (MARK_NAME, "a checkpoint"), (MANIFEST_NAME, "a data set")],
)
def test_a_run_or_a_checkpoint_is_not_exported_into(
    folder: Path, tmp_path: Path, marks: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / marks).mkdir(parents=True)
    assert command_line.export([str(folder.parent / "w.pth"), str(tmp_path / "run"), "--overwrite"]) == 1
    assert f"/run: is {kind}, with which an export there would be confused; name a folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [marks]


def test_a_format_that_is_not_written_is_no_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.export([str(folder.parent / "w.pth"), str(tmp_path / "m.safetensors")]) == 1
    assert "m.safetensors: is no format of an export; name NAME.pth, NAME.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["m.pth", "m.gguf", "m"])
def test_an_export_has_one_writer_and_replaces_nothing_that_was_written_meanwhile(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    with sole_writer(out, what="export", remedy="wait", is_folder=name == "m"):
        assert command_line.export([str(folder), str(out)]) == 1
    assert f"{out}: this export is in use (by process " in capsys.readouterr().err
    assert command_line.export([str(folder), str(out)]) == 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert ".lock" not in "".join(map(str, written))
    with pytest.raises(UserError, match="exists already"):
        export(folder, out, dtype=torch.float32, tokenizer=None, overwrite=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == {
        path: time for path, time in written.items() if path.is_file()
    }


@pytest.mark.parametrize("name", ["README.md", "config.json", "record.json", "notes.txt"])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_an_export_is_not_written_among_other_files(
    folder: Path, tmp_path: Path, name: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"mine": 1}')
    (out / ".gitattributes").touch()
    assert command_line.export([str(folder), str(out), *options]) == 1
    expected = f"error: {out / name}: is in the folder to write to, which holds no earlier export; move it away, or "
    assert expected in capsys.readouterr().err
    assert sorted(file.name for file in out.iterdir()) == sorted([".gitattributes", name])
    assert (out / name).read_text() == '{"mine": 1}'
    (out / name).unlink()
    assert command_line.export([str(folder), str(out), *options]) == 0


def test_an_export_that_fails_leaves_nothing_in_the_way_of_the_next(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))  # of the vocabulary, and not of the weights
    try:
        assert command_line.export([str(folder), str(tmp_path / "out")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "model.safetensors: cannot be written" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert command_line.export([str(folder), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("name", ["hf", "m.pth"])
def test_an_export_is_not_written_in_a_data_set(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set" / "tokenizer").mkdir(parents=True)
    (tmp_path / "set" / MANIFEST_NAME).touch()
    assert command_line.export([str(folder), str(tmp_path / "set" / name)]) == 1
    assert "this export would be in " in capsys.readouterr().err
    assert not (tmp_path / "set" / name).exists()


def test_a_card_that_was_edited_is_kept(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder), str(tmp_path / "out")]
    assert command_line.export(arguments) == 0
    card = tmp_path / "out" / "README.md"
    as_written = card.read_text()
    assert command_line.export([*arguments, "--dtype", "float32", "--overwrite"]) == 0
    assert "weights in float32" in card.read_text() != as_written
    edited = card.read_text().replace("# RWKV-7", "# My RWKV-7")
    card.write_text(edited)
    assert command_line.export([*arguments, "--overwrite"]) == 0
    assert card.read_text() == edited
