"""From a file of JSON lines to a task's score by lm-evaluation-harness alone, with the commands of the README."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fork_server import ROOT, ForkServer
from tests.inference.test_tasks import QUESTIONS, write_tasks

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
SCORES = ("colors/acc", "color_words/exact_match", "color_answers/acc")


def write_inputs(folder: Path) -> None:
    texts = [f"{question} {choices[label]}." for question, choices, label in QUESTIONS]
    lines = [json.dumps({"text": f"{texts[i % 4]} {texts[(i + i // 4) % 4]}"}) for i in range(400)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mine.yaml").write_text(RECIPE)
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")


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
    tasks = ",".join(score.partition("/")[0] for score in SCORES)
    scores = json.loads(run(ours, "evaluate", "run", "--tasks", tasks, "--task-folder", "tasks", "--json"))
    assert scores["tasks/colors/acc"] == 1.0
    harness = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=model-hf,trust_remote_code=True",
        "--tasks", tasks, "--include_path", "tasks", "--device", "cpu", "--output_path", "scores",
    ]  # fmt: skip
    # A process of its own: libraries read the place of the code that they copy when they are imported.
    done = subprocess.run(harness, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "scores").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    theirs = {f"{task}/{key.partition(',')[0]}": value for task in results for key, value in results[task].items()}
    assert [theirs[score] for score in SCORES] == [scores[f"tasks/{score}"] for score in SCORES]
    perplexities = theirs["color_answers/perplexity"], scores["tasks/color_answers/perplexity"]
    found, expected = map(math.log, perplexities)
    assert found == pytest.approx(expected, rel=1e-4)  # sums of float32 log-likelihoods, in another order
