"""From a file of JSON lines to a task's score by lm-evaluation-harness alone, with the commands of the README."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fork_server import ROOT, ForkServer

QUESTIONS = [("The sky is", "blue"), ("The grass is", "green"), ("The rose is", "red"), ("The snow is", "white")]
RECIPE = """
out: shards
tokenizer: words
sources:
  mine: {paths: texts.jsonl}
deduplicate: none
pack_tokens: 256
edges: [256]
validation: 0.05
"""
TASK = """
task: colors
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
"""


def write_inputs(folder: Path) -> None:
    texts = [f"{question} {answer}." for question, answer in QUESTIONS]
    lines = [json.dumps({"text": f"{texts[i % 4]} {texts[(i + i // 4) % 4]}"}) for i in range(400)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mine.yaml").write_text(RECIPE)
    colors = [answer for _, answer in QUESTIONS]
    rows = [
        json.dumps({"question": question, "choices": colors, "label": i}) for i, (question, _) in enumerate(QUESTIONS)
    ]
    (folder / "colors.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "colors.yaml").write_text(TASK.replace("FILE", str(folder / "colors.jsonl")))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_new_user_goes_from_a_corpus_to_a_score(tmp_path: Path, programs: ForkServer) -> None:
    write_inputs(tmp_path)
    environment = {
        **os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip

    def run(*arguments: str) -> str:
        done = programs.run([sys.executable, "-m", *arguments], cwd=tmp_path, env=environment, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ours = "streaming_rwkv"
    run(ours, "train-tokenizer", "mine.yaml", "--vocab-size", "280", "--to", "words")
    run(ours, "prepare", "mine.yaml")
    run(
        ours, "train", str(ROOT / "yamls" / "tiny_cpu.yaml"), "data.path=shards", "save_folder=run",
        "model.hidden_size=64", "model.num_layers=2", "data.stages.0.passes=10",
    )  # fmt: skip
    run(ours, "export", "run", "model-hf", "--self-contained", "--dtype", "float32")
    scores = json.loads(run(ours, "evaluate", "run", "--tasks", "colors", "--task-folder", "tasks", "--json"))
    assert scores["tasks/colors/acc"] == 1.0
    harness = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=model-hf,trust_remote_code=True",
        "--tasks", "colors", "--include_path", "tasks", "--device", "cpu", "--output_path", "scores",
    ]  # fmt: skip
    # A process of its own: libraries read the place of the code that they copy when they are imported.
    done = subprocess.run(harness, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "scores").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["colors"]["acc,none"] == 1.0
