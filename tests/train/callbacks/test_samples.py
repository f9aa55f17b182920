"""Samples at evaluations: what generation gives from the weights of that step; the training is left as it is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import State
from composer.devices import DeviceCPU
from composer.loggers import Logger, LoggerDestination, TensorboardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from streaming_rwkv.config import ConfigError, validate
from streaming_rwkv.inference.sampling import generate_tokens
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.model.weights import read_model, read_state
from streaming_rwkv.tokenizer import load_tokenizer
from streaming_rwkv.train.callbacks.samples import Samples, text_until_end
from streaming_rwkv.train.composer_model import RWKV7ForTraining
from streaming_rwkv.train.config import EvaluationConfig
from tests.fork_server import ForkServer
from tools.ports import free_ports

ROOT = Path(__file__).parents[3]
WORDS = 20


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """w0 … w19, of which w0 begins and ends a document."""
    words = HuggingFaceTokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["w0"])
    (tmp_path / "made").mkdir()
    words.save(str(tmp_path / "made" / "tokenizer.json"))
    load_tokenizer(tmp_path / "made", bos_token="w0", eos_token="w0").save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


class Tables(LoggerDestination):
    def __init__(self) -> None:
        self.tables: list[Any] = []

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        self.tables.append((name, columns, rows, step))


def state_of(*, step: int) -> State:
    network = RWKV7(RWKV7Config(vocab_size=WORDS, hidden_size=64, num_layers=1))
    initialize(network, seed=1)
    with torch.no_grad():  # the head is 0 at first, and every token as likely as the others
        network.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        network.emb.weight.normal_(generator=torch.Generator().manual_seed(2))
    model = RWKV7ForTraining(network, num_streams=1, flops_per_token=1)
    state = State(model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="10ba")
    state.timestamp = state.timestamp.copy(batch=step)
    return state


def samples(path: Path, tokenizer_folder: Path, **evaluation: Any) -> Samples:
    return Samples(
        path, validate(EvaluationConfig, evaluation, where="evaluation"), tokenizer_folder=tokenizer_folder, seed=5
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_prompt_is_continued_as_generation_does(tokenizer_folder: Path, tmp_path: Path) -> None:
    state, tables = state_of(step=12), Tables()
    logger = Logger(state, destinations=[tables])
    prompts = ["w3 w4", ""]
    callback = samples(tmp_path / "samples.jsonl", tokenizer_folder, prompts=prompts, sample_tokens=6)
    callback.fit_start(state, logger)
    torch.manual_seed(0)
    callback.eval_end(state, logger)
    after = torch.rand(())
    torch.manual_seed(0)
    assert after == torch.rand(())  # no random number of the training's was used

    tokenizer = load_tokenizer(tokenizer_folder)
    assert isinstance(state.model, RWKV7ForTraining)
    expected = []
    for number, tokens in enumerate([[0, 3, 4], [0]]):
        generator = torch.Generator().manual_seed(5 + number)
        sampled = list(
            generate_tokens(state.model.network, tokens, max_tokens=6, top_p=0.9, stop={0}, generator=generator)
        )
        expected.append({"step": 12, "prompt": prompts[number], "text": tokenizer.decode(sampled)})
    assert lines_of(tmp_path / "samples.jsonl") == expected
    assert all(line["text"] for line in expected)
    rows = [[12, line["prompt"], line["text"]] for line in expected]
    assert tables.tables == [("samples", ["step", "prompt", "text"], rows, 12)]


def test_a_text_ends_at_the_end_of_the_document() -> None:
    assert text_until_end([5, 6, 0, 7, 0], end=0, decode=str) == "[5, 6]"
    assert text_until_end([5, 6], end=0, decode=str) == "[5, 6]"


def test_the_text_changes_with_the_model_alone(tokenizer_folder: Path, tmp_path: Path) -> None:
    state = state_of(step=1)
    logger = Logger(state, destinations=[])
    callback = samples(tmp_path / "samples.jsonl", tokenizer_folder, prompts=["w3"], sample_tokens=12)
    callback.fit_start(state, logger)
    for step in (1, 2):
        state.timestamp = state.timestamp.copy(batch=step)
        callback.eval_end(state, logger)
    assert isinstance(state.model, RWKV7ForTraining)
    state.model.network.head.weight.data.neg_()
    callback.eval_end(state, logger)
    first, again, changed = (line["text"] for line in lines_of(tmp_path / "samples.jsonl"))
    assert first == again != changed


def test_samples_reach_tensorboard_as_text(tokenizer_folder: Path, tmp_path: Path) -> None:
    state = state_of(step=7)
    board = TensorboardLogger(log_dir=str(tmp_path / "board"))
    logger = Logger(state, destinations=[board])
    board.init(state, logger)
    callback = samples(tmp_path / "samples.jsonl", tokenizer_folder, prompts=["w3 w4"], sample_tokens=3)
    callback.fit_start(state, logger)
    callback.eval_end(state, logger)
    (line,) = lines_of(tmp_path / "samples.jsonl")
    board.close(state, logger)
    events = EventAccumulator(str(tmp_path / "board" / "test"))
    events.Reload()
    (event,) = events.Tensors("samples/0/text_summary")
    assert event.step == 7
    assert event.tensor_proto.string_val[0].decode() == f"````\nw3 w4{line['text']}\n````"


def test_a_resumed_run_removes_the_samples_after_its_step(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    kept = '{"step": 10, "prompt": "你好", "text": "a\u2028b"}\n'
    path.write_text(kept + '{"step": 20, "prompt": "", "text": "later"}\n{"step": 20, "pro', encoding="utf-8")
    samples(path, tokenizer_folder).rewind(10)
    assert path.read_text(encoding="utf-8") == kept


def test_without_prompts_nothing_is_read_or_written(tmp_path: Path) -> None:
    state = state_of(step=1)
    logger = Logger(state, destinations=[])
    callback = samples(tmp_path / "samples.jsonl", tmp_path / "no tokenizer here")
    callback.rewind(0)
    callback.fit_start(state, logger)
    callback.eval_end(state, logger)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"sample_top_p": 0}, {"sample_temperature": -1}, {"sample_tokens": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        validate(EvaluationConfig, wrong, where="evaluation")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_samples_of_two_processes_leave_the_training_as_it_is(
    write_data_set: Callable[..., Path], programs: ForkServer, tmp_path: Path
) -> None:
    """FSDP2 on two ranks: the text is the checkpoint's, and the weights are those of the run without samples."""
    data = write_data_set(tmp_path / "data", {("web", 1, 16): 24}, validation={("web", 1, 16): 4})

    def train(name: str, *overrides: str) -> Path:
        command = [
            Path(sys.executable).with_name("composer"), "-n", "2", "--master_port", str(free_ports(1)[0]),
            "train.py", "yamls/tiny_cpu.yaml",
            f"data.path={data}", f"save_folder={tmp_path / name}", "model.hidden_size=64", "model.num_layers=1",
            "data.batch_packs=4", "data.workers=0", "evaluation.interval_steps=2", "checkpoint.interval_steps=2",
            "checkpoint.keep=0", "log.tensorboard=false", *overrides,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = programs.run(command, cwd=ROOT, env=environment, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        return tmp_path / name

    plain = train("plain", "seed=17")
    sampled = train(
        "sampled", "evaluation.prompts=[w3w4,'']", "evaluation.sample_tokens=12", "evaluation.sample_temperature=1",
        "evaluation.sample_top_p=1", "seed=17",
    )  # fmt: skip
    weights, expected = (read_state(folder / "checkpoints" / "step-00000006") for folder in (sampled, plain))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    lines = lines_of(sampled / "samples.jsonl")
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6, 6]
    assert len({line["text"] for line in lines}) > 1
    tokenizer = load_tokenizer(sampled / "tokenizer")
    for place, line in enumerate(lines):
        model = read_model(sampled / "checkpoints" / f"step-{line['step']:08}")
        tokens = [tokenizer.bos_id, *tokenizer.encode(line["prompt"]).tolist()]
        generator = torch.Generator().manual_seed(17 + place % 2)  # each prompt has its own, the same at every step
        ids = list(generate_tokens(model, tokens, max_tokens=12, stop={tokenizer.eos_id}, generator=generator))
        assert line["text"] == tokenizer.decode(ids)
    assert not (plain / "samples.jsonl").exists()
