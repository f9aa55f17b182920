"""Standard tasks through lm-evaluation-harness, on questions in a local file."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from streaming_rwkv.inference.command_line import evaluate as main
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.model.state import model_state
from streaming_rwkv.model.weights import write_pth
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer

# The harness takes many seconds to import, and it and its requirements deprecate each other's names.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]

QUESTIONS = [
    ("The sky is", ["blue", "green", "red"], 0),
    ("The grass is", ["blue", "green", "red"], 1),
    ("The rose is", ["blue", "green", "red"], 2),
    ("The snow is", ["black", "white"], 1),
]
TASKS = {
    "colors": """
task: colors
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
""",
    "color_words": """
task: color_words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{' ' + choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 20}
metric_list: [{metric: exact_match}]
""",
    "color_answers": """
task: color_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}."
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "color_texts": """
task: color_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module", autouse=True)
def harness(tmp_path_factory: pytest.TempPathFactory) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets.config
        import lm_eval.evaluator  # noqa: F401
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    write_tasks(place)
    return place


def write_tasks(place: Path) -> None:
    """Write the tasks and their questions, which also the way from a corpus to scores asks."""
    lines = [json.dumps({"question": q, "choices": c, "label": a}) for q, c, a in QUESTIONS]
    (place / "colors.jsonl").write_text("\n".join(lines) + "\n")
    for name, text in TASKS.items():
        (place / f"{name}.yaml").write_text(text.replace("FILE", str(place / "colors.jsonl")))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([question for question, _, _ in QUESTIONS], trainer)
    place = tmp_path_factory.mktemp("words") / "tokenizer"
    place.mkdir()
    bpe.save(str(place / "tokenizer.json"))
    return load_tokenizer(place, bos_token="<end>", eos_token="<end>")


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory, words: Tokenizer) -> Path:
    """A model that knows the answers, with its tokenizer, as a run leaves them."""
    texts = [
        [words.bos_id, *words.encode(f"{question} {choices[answer]}.").tolist(), words.eos_id]
        for question, choices, answer in QUESTIONS
    ]
    model = RWKV7(RWKV7Config(vocab_size=words.vocab_size, hidden_size=64, num_layers=1))
    initialize(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        losses = [model(torch.tensor([t[:-1]]), targets=torch.tensor([t[1:]])).mean() for t in texts]
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    run = tmp_path_factory.mktemp("run")
    write_pth(model_state(model), run / "model.pth", dtype=torch.float32)
    words.save(run / "tokenizer")
    return run / "model.pth"


def metrics_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "it/s" not in err  # no progress bar where standard error is no terminal
    found: dict[str, Any] = json.loads(out[out.index("{\n") :])
    return found


def test_a_model_that_knows_the_answers_scores_1(
    overfitted: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = metrics_of(capsys, overfitted, "--tasks", "colors,color_words,color_texts", "--task-folder", folder)
    assert found["tasks/colors/acc"] == 1.0
    assert found["tasks/color_words/exact_match"] == 1.0
    assert 0 < found["tasks/color_texts/bits_per_byte"] < 1


def test_limit_and_shots(overfitted: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: Sequence[object] = [overfitted, "--tasks", "colors", "--task-folder", folder]
    assert metrics_of(capsys, *options, "--limit", 2)["tasks/colors/acc"] == 1.0
    assert 0 <= metrics_of(capsys, *options, "--shots", 1)["tasks/colors/acc"] <= 1


def test_what_is_missing_is_named(
    overfitted: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(overfitted), "--tasks", "colours", "--task-folder", str(folder)]) == 1
    assert "--tasks colours: no such task in " in capsys.readouterr().err
    (tmp_path / "colors.yaml").write_text(TASKS["colors"].replace("FILE", str(tmp_path / "nowhere.jsonl")))
    assert main([str(overfitted), "--tasks", "colors", "--task-folder", str(tmp_path)]) == 1
    assert "--tasks colors: the data of a task cannot be read" in capsys.readouterr().err
    other = tmp_path / "place" / "model.pth"
    other.parent.mkdir()
    other.write_bytes(overfitted.read_bytes())
    assert main([str(other), "--tasks", "colors", "--task-folder", str(folder)]) == 1
    assert "no tokenizer is stored with it; name one with --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("test_split: test", "test_split: zz"),
        ("output_type: multiple_choice", "output_type: zz"),
        ("doc_to_target: label", "doc_to_target: 9"),
        ("doc_to_choice: choices", 'doc_to_choice: ""'),
        ("metric: acc", "metric: zz"),
        ("{{question}}", "{{question"),
    ],
)
def test_a_task_that_the_harness_cannot_ask_is_one_line(
    before: str, after: str, overfitted: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TASKS["colors"].replace("FILE", str(folder / "colors.jsonl")).replace(before, after)
    (tmp_path / "colors.yaml").write_text(text)
    assert main([str(overfitted), "--tasks", "colors", "--task-folder", str(tmp_path)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "--tasks colors: lm-evaluation-harness fails (" in line
    assert line.endswith("; fix the YAML of the task")


def test_a_task_that_is_a_pipe_is_not_waited_for(
    overfitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "colors.yaml")
    assert main([str(overfitted), "--tasks", "colors", "--task-folder", str(tmp_path)]) == 1
    assert "colors.yaml is not a regular file; remove it" in capsys.readouterr().err
