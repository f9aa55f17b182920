"""Tasks of lm-evaluation-harness on a few questions in a local file, and a model and a tokenizer to ask."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.tokenizer import load_tokenizer
from streaming_rwkv.train.composer_model import RWKV7ForTraining
from tests.train.callbacks.run_state import Collected

WORDS = 20
QUESTIONS = [(f"w{1 + i} w{2 + i}", [f"w{3 + i}", f"w{4 + i} w{5 + i}"], i % 2) for i in range(5)]
KINDS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
""",
    "words": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["w7", "w8"], max_gen_toks: 9, do_sample: true, temperature: 1.0}
metric_list: [{metric: exact_match}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
}


def import_harness(cache: Path) -> None:
    """Import lm_eval, whose requirements deprecate each other's names, with a cache of data of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets.config
        import lm_eval.evaluator  # noqa: F401
    datasets.config.HF_DATASETS_CACHE = cache


def write_task(
    folder: Path, name: str, text: str, questions: Sequence[tuple[str, Sequence[str], int]] = tuple(QUESTIONS)
) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"question": q, "choices": c, "label": a}) for q, c, a in questions]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    files = json.dumps({"test": str(folder / f"{name}.jsonl")})
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntest_split: test\n"
    (folder / f"{name}.yaml").write_text(head + text)


def save_words(folder: Path) -> Path:
    """w0 … w19, of which w0 begins and ends a document."""
    words = HuggingFaceTokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["w0"])
    (folder / "made").mkdir(parents=True)
    words.save(str(folder / "made" / "tokenizer.json"))
    load_tokenizer(folder / "made", bos_token="w0", eos_token="w0").save(folder / "tokenizer")
    return folder / "tokenizer"


def network() -> RWKV7:
    model = RWKV7(RWKV7Config(vocab_size=WORDS, hidden_size=64, num_layers=2))
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # the head is 0 at first, and every token as likely as the others
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def state_of(model: RWKV7ForTraining, *, step: int) -> tuple[State, Logger, Mapping[str, Any]]:
    state = State(model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="10ba")
    state.timestamp = state.timestamp.copy(batch=step)
    collected = Collected()
    return state, Logger(state, destinations=[collected]), collected.metrics
