"""Self-contained folders: transformers alone computes and generates what our model does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streaming_rwkv.inference import command_line
from streaming_rwkv.inference.export import export
from streaming_rwkv.inference.sampling import generate_tokens
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.state import model_state
from streaming_rwkv.model.weights import read_model, write_pth
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from tests.inference.small_models import bpe, random_model

TEXTS = ["the cat", "", "the bat and the hat and the cat and the hat", "新しい\n\n <end>"]
NEW_TOKENS = 12
# float32 sums of up to 256 products near 1, in another order and in chunks
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
ROWS = [
    [(7 * index + index * index) % 270 for index in range(70)],  # five chunks, the last of them not full
    [5, 96, 0, 0, 31, 7, 8, 42, 1, 64, 13],
    [3],
]


@dataclass(frozen=True, kw_only=True)
class Exported:
    folder: Path
    world: Path
    words: Tokenizer
    model: RWKV7
    found: dict[str, Any]  # see the worker


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    place = tmp_path_factory.mktemp("self-contained")
    words, model = bpe(place / "words"), random_model()
    write_pth(model_state(model), place / "model.pth", dtype=torch.float32)
    words.save(place / "tokenizer")
    arguments = [str(place / "model.pth"), str(place / "folder"), "--self-contained", "--dtype", "float32"]
    assert command_line.export(arguments) == 0
    small = random_model(vocab_size=65536, hidden_size=64, num_layers=1)
    write_pth(model_state(small), place / "small.pth")
    world = load_tokenizer("rwkv-world")
    export(place / "small.pth", place / "world", dtype=torch.bfloat16, tokenizer=world, self_contained=True)
    (place / "request.json").write_text(json.dumps({"rows": ROWS, "texts": TEXTS, "new_tokens": NEW_TOKENS}))
    worker = Path(__file__).with_name("self_contained_worker.py")
    done = subprocess.run(
        [sys.executable, worker, place / "folder", place / "world", place / "request.json", place / "found.pt"],
        env={"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.load(place / "found.pt")
    return Exported(folder=place / "folder", world=place / "world", words=words, model=model, found=found)


@pytest.fixture(scope="module")
def expected(exported: Exported) -> list[Tensor]:
    with torch.no_grad():
        return [exported.model(torch.tensor([row]))[0] for row in ROWS]


def test_logits_are_those_of_our_model(exported: Exported, expected: list[Tensor]) -> None:
    for found, ours in zip(exported.found["logits"], expected, strict=True):
        torch.testing.assert_close(found, ours, **TOLERANCE)
    assert max(ours.abs().max() for ours in expected) > 1  # the tolerance is small beside them


@pytest.mark.parametrize("name", ["bfloat16", "autocast"])
def test_bfloat16_differs_by_its_rounding(exported: Exported, expected: list[Tensor], name: str) -> None:
    difference = (exported.found[name] - expected[0]).norm() / expected[0].norm()
    assert 1e-4 < difference < 0.05  # a rounding is 2⁻⁹ at most, and some hundred of them follow each other


def test_a_carried_state_continues_rows(exported: Exported, expected: list[Tensor]) -> None:
    torch.testing.assert_close(exported.found["parts"], expected[0], **TOLERANCE)
    heads, head_size, layers = 2, 64, 3
    assert exported.found["state_bytes"] == 4 * layers * (heads * head_size**2 + 2 * heads * head_size)


def test_padding_on_either_side_changes_no_logits(exported: Exported, expected: list[Tensor]) -> None:
    left, right = exported.found["left"], exported.found["right"]
    for row, ours in enumerate(expected):
        torch.testing.assert_close(left[row, -len(ours) :], ours, **TOLERANCE)
        torch.testing.assert_close(right[row, : len(ours)], ours, **TOLERANCE)
        torch.testing.assert_close(right[row, -1], ours[-1], **TOLERANCE)  # the newest token's


def test_a_mask_of_another_shape_is_refused(exported: Exported) -> None:
    assert exported.found["refusal"] == "attention_mask: found shape (1, 1, 3, 3), expected (1, 70 or more)"


def test_greedy_texts_of_a_padded_batch_are_those_of_our_generate(exported: Exported) -> None:
    words, found = exported.words, exported.found
    width = found["prompts"].shape[1]
    for text, prompt, row in zip(TEXTS, found["prompts"].tolist(), found["greedy"].tolist(), strict=True):
        ids = [words.bos_id, *words.encode(text.removesuffix("<end>")).tolist()]
        ids += [words.eos_id] if text.endswith("<end>") else []  # transformers reads special tokens in texts
        assert prompt == [words.eos_id] * (width - len(ids)) + ids
        ours = list(generate_tokens(exported.model, ids, max_tokens=NEW_TOKENS, temperature=0, stop={words.eos_id}))
        assert row[width : width + len(ours)] == ours
        with torch.no_grad():
            top = exported.model(torch.tensor([ids + ours]))[0, len(ids) - 1 :].topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 10 * TOLERANCE["atol"]  # no token is chosen by rounding
    assert torch.equal(found["greedy"], found["greedy_uncached"])


def test_beam_search_carries_each_beams_state(exported: Exported) -> None:
    assert torch.equal(exported.found["beams"], exported.found["beams_uncached"])
    assert not torch.equal(exported.found["beams"], exported.found["greedy"])


def test_labels_give_a_loss_whose_gradient_reaches_all_weights(exported: Exported, expected: list[Tensor]) -> None:
    loss = torch.nn.functional.cross_entropy(expected[0][:-1], torch.tensor(ROWS[0][1:]))
    torch.testing.assert_close(exported.found["loss"], loss, **TOLERANCE)
    assert exported.found["without_gradient"] == []


def test_what_transformers_saves_is_loaded_there_and_here(exported: Exported) -> None:
    assert torch.equal(exported.found["again"], exported.found["logits"][0])
    again = exported.folder.parent / "again"
    assert (again / "modeling_rwkv7.py").read_bytes() == (exported.folder / "modeling_rwkv7.py").read_bytes()
    for folder in (exported.folder, again):
        ours = model_state(read_model(folder))
        assert all(torch.equal(value, ours[name]) for name, value in model_state(exported.model).items())


def test_tokenizers_begin_each_text_with_bos(exported: Exported) -> None:
    both = [exported.words, load_tokenizer("rwkv-world")]
    for name in ("tokenizers", "tokenizers_again"):
        for words, (ids, without_bos, texts) in zip(both, exported.found[name], strict=True):
            assert ids == [[words.bos_id, *row] for row in without_bos]
            assert without_bos[:3] == [words.encode(text).tolist() for text in TEXTS[:3]]
            assert texts[:3] == TEXTS[:3]


def test_the_folder_has_our_tokenizer_and_says_how_it_is_loaded(exported: Exported) -> None:
    for folder, tokenizer in ((exported.folder, exported.words), (exported.world, load_tokenizer("rwkv-world"))):
        assert load_tokenizer(folder).sha256 == tokenizer.sha256
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert 'AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)' in card
        assert 'AutoTokenizer.from_pretrained(".", trust_remote_code=True)' in card
        assert "lm_eval --model hf --model_args pretrained=.,trust_remote_code=True" in card
        assert "import fla" not in card


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("m.pth", [], "--self-contained: for a Hugging Face folder, found 'm.pth'; name a folder"),
        ("m.gguf", [], "--self-contained: for a Hugging Face folder, found 'm.gguf'; name a folder"),
        ("m", ["--layout", "transformers"], "--self-contained: transformers has code for its own layout; leave --lay"),
    ],
)
def test_other_formats_contain_no_code(
    out: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line.export(["model.pth", out, "--self-contained", *options])
    assert message in capsys.readouterr().err
