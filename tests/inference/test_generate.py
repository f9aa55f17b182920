"""Generated text: drawing, streaming, the command line, and the same greedy text as BlinkDL's `rwkv`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streaming_rwkv.inference import command_line, sampling
from streaming_rwkv.inference.generate import stream_text
from streaming_rwkv.inference.generation_checks import GenerationError
from streaming_rwkv.inference.loading import find_tokenizer
from streaming_rwkv.inference.sampling import choose
from streaming_rwkv.inference.text import generate
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.model.state import model_state
from streaming_rwkv.model.weights import read_model, write_huggingface, write_pth
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import build_optimizer

TEXT = "The quick brown fox jumps over the lazy dog. 我能吞下玻璃而不伤身体。 def f(x): return x * 2"


def model_of(vocab_size: int, *, num_layers: int = 2) -> RWKV7:
    model = RWKV7(RWKV7Config(vocab_size=vocab_size, hidden_size=64, num_layers=num_layers))
    initialize(model, seed=0)
    return model


@pytest.fixture(scope="module")
def world() -> Tokenizer:
    return load_tokenizer("rwkv-world")


@pytest.fixture(scope="module")
def memorized(world: Tokenizer) -> RWKV7:
    """A small model that has learnt TEXT by heart."""
    model = model_of(world.vocab_size)
    ids = torch.tensor([[world.bos_id, *world.encode(TEXT).tolist(), world.eos_id]])
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, lr_final=1e-2))
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(ids[:, :-1], targets=ids[:, 1:]).mean()
        if loss < 0.05:
            return model
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise AssertionError(f"still at loss {loss}")


def test_temperature_0_takes_the_likeliest() -> None:
    assert choose(torch.tensor([0.0, 3.0, 2.9]), temperature=0, top_p=1) == 1


def draws(*, temperature: float, top_p: float) -> list[int]:
    """The number of times that each of four tokens with probabilities 0.5, 0.1, 0.3, 0.1 is sampled."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    sampled = [choose(logits, temperature=temperature, top_p=top_p, generator=generator) for _ in range(4000)]
    return [sampled.count(token) for token in range(4)]


def test_sampling_follows_the_probabilities() -> None:
    # Four standard deviations of 4000 draws: 4·√(4000·0.5·0.5) = 126
    assert draws(temperature=1, top_p=1) == pytest.approx([2000, 400, 1200, 400], abs=126)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [0]), (0.49, [0]), (0.51, [0, 2]), (0.79, [0, 2]), (0.81, [0, 1, 2])],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: list[int]) -> None:
    assert [token for token, count in enumerate(draws(temperature=1, top_p=top_p)) if count] == kept


def test_a_low_temperature_sharpens() -> None:
    # 0.5² : 0.3² : 0.1² : 0.1² = 25 : 9 : 1 : 1
    assert draws(temperature=0.5, top_p=1) == pytest.approx([2778, 111, 1000, 111], abs=126)


def test_no_temperature_overflows() -> None:
    for temperature in (1e-38, 1e-300):
        assert choose(torch.tensor([1e4, 2e4, 0.0]), temperature=temperature, top_p=1.0) == 1


def test_the_smallest_top_p_takes_the_likeliest() -> None:
    assert choose(torch.tensor([1.0, 2.0, 0.0]), temperature=1.0, top_p=1e-320) == 1


def test_logits_that_are_not_finite_are_named() -> None:
    with pytest.raises(GenerationError, match="not finite: its training has diverged"):
        choose(torch.tensor([1.0, math.nan]), temperature=1.0, top_p=1.0)


def test_ids_beyond_the_tokenizer_are_not_sampled() -> None:
    model = model_of(64)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.head.weight[50:] *= 10
    for temperature in (0.0, 1.0):
        highest = [
            max(sampling.generate_tokens(model, [1], max_tokens=20, temperature=temperature, vocab_size=vocab_size))
            for vocab_size in (None, 50)
        ]
        assert highest[1] < 50 <= highest[0]


def test_the_same_seed_generates_the_same_text() -> None:
    model = model_of(50)
    texts = [
        list(sampling.generate_tokens(model, [1], max_tokens=20, generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_token_ends_the_text_and_is_not_yielded(memorized: RWKV7, world: Tokenizer) -> None:
    prompt = [world.bos_id, *world.encode("The quick").tolist()]
    ids = list(sampling.generate_tokens(memorized, prompt, max_tokens=200, temperature=0, stop={world.eos_id}))
    assert world.decode(ids) == TEXT.removeprefix("The quick")


def test_generating_leaves_gradients_on_for_the_caller() -> None:
    iterator = sampling.generate_tokens(model_of(50), [1], max_tokens=3)
    next(iterator)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"tokens": []}, "prompt: is empty; begin with the tokenizer's bos token"),
        ({"tokens": [1], "top_p": 0.0}, "expected temperature ≥ 0 and 0 < top_p ≤ 1"),
        ({"tokens": [1], "temperature": -1.0}, "expected temperature ≥ 0 and 0 < top_p ≤ 1"),
        ({"tokens": [1], "temperature": math.nan}, "expected temperature ≥ 0 and 0 < top_p ≤ 1"),
        ({"tokens": [1], "temperature": "hot"}, "temperature 'hot', top_p 1.0: expected temperature ≥ 0"),
        ({"tokens": [1], "max_tokens": 1.5}, "max_tokens 1.5: expected a whole number, at least 0"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, object], error: str) -> None:
    with pytest.raises(GenerationError, match=error):
        next(sampling.generate_tokens(model_of(50), **({"max_tokens": 1} | arguments)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "runs/mine"}, "model: found a str, expected an RWKV7, such as load_model returns"),
        ({"tokenizer": "rwkv-world"}, "tokenizer: found 'rwkv-world', expected one, such as load_tokenizer"),
        ({"prompt": None}, "prompt: found NoneType, expected text"),
        ({"seed": "hot"}, "seed 'hot': expected a whole number of 64 bits"),
    ],
)
def test_arguments_of_another_type_are_refused(world: Tokenizer, arguments: dict[str, Any], error: str) -> None:
    model = model_of(world.vocab_size)
    with pytest.raises(GenerationError, match=error):
        generate(**({"model": model, "tokenizer": world, "prompt": "x"} | arguments))


def test_text_is_streamed_in_whole_characters(world: Tokenizer) -> None:
    text = "a 🦤 b"
    one_by_one = [byte + 1 for byte in text.encode()]  # World's ids 1 … 256 are the single bytes
    assert world.decode(one_by_one) == text
    assert list(stream_text(world, one_by_one)) == ["a", " ", "🦤", " ", "b"]
    assert list(stream_text(world, one_by_one[:4])) == ["a", " ", "�"]  # cut in the middle of a character


def test_greedy_text_equals_that_of_the_rwkv_package(memorized: RWKV7, world: Tokenizer, tmp_path: Path) -> None:
    """The exported file, BlinkDL's model code and his tokenizer, in a process of their own."""
    write_pth(model_state(memorized), tmp_path / "model.pth")
    prompt = "The quick"
    worker = Path(__file__).with_name("rwkv_worker.py")
    arguments = [worker, tmp_path / "model.pth", "rwkv_vocab_v20230424", 0, prompt, tmp_path / "out.json"]
    subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True, timeout=120)
    their_ids, their_text = json.loads((tmp_path / "out.json").read_text())

    model = read_model(tmp_path / "model.pth")
    tokens = [0, *world.encode(prompt).tolist()]
    ids = list(sampling.generate_tokens(model, tokens, max_tokens=100, temperature=0, stop={0}))
    assert ids == their_ids
    assert "".join(stream_text(world, ids)) == their_text == TEXT.removeprefix(prompt)


# The command line


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = command_line.generate([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_the_text(memorized: RWKV7, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pth(model_state(memorized), tmp_path / "model.pth")
    arguments = [tmp_path / "model.pth", "The quick", "--tokenizer", "rwkv-world", "--temperature", 0]
    code, out, err = run(*arguments, capsys=capsys)
    assert (code, out) == (0, TEXT.removeprefix("The quick") + "\n")
    assert "tokens in" in err


def test_an_exported_folder_is_complete_in_itself(
    memorized: RWKV7, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pth(model_state(memorized), tmp_path / "model.pth")
    assert command_line.export([str(tmp_path / "model.pth"), str(tmp_path / "hf"), "--tokenizer", "rwkv-world"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'hf'}: ")
    code, out, _ = run(tmp_path / "hf", "The quick", "--temperature", 0, capsys=capsys)
    assert (code, out) == (0, TEXT.removeprefix("The quick") + "\n")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)

    assert command_line.export([str(tmp_path / "hf"), str(tmp_path / "back.pth")]) == 0
    before, after = torch.load(tmp_path / "model.pth"), torch.load(tmp_path / "back.pth")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_tokenizer_of_a_run_is_found(world: Tokenizer, tmp_path: Path) -> None:
    world.save(tmp_path / "tokenizer")
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    for place in (checkpoint, tmp_path, tmp_path / "model.pth"):
        found = find_tokenizer(place)
        assert found is not None
        assert found.sha256 == world.sha256


def test_without_a_tokenizer_the_command_says_how_to_give_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pth(model_state(model_of(50)), tmp_path / "model.pth")
    code, out, err = run(tmp_path / "model.pth", capsys=capsys)
    assert (code, out) == (1, "")
    assert "no tokenizer is stored with it; name one with --tokenizer" in err


def test_a_missing_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(tmp_path / "nothere", capsys=capsys)
    assert code == 1
    assert err.startswith(f"error: {tmp_path / 'nothere'}: no such file or folder; give a run's save folder, ")


def test_a_tokenizer_too_large_for_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pth(model_state(model_of(50)), tmp_path / "model.pth")
    code, _, err = run(tmp_path / "model.pth", "--tokenizer", "rwkv-world", capsys=capsys)
    assert code == 1
    assert "the model has 50 tokens, the tokenizer 'rwkv-world' has 65536" in err


@pytest.mark.parametrize(
    ("out", "error"),
    [("s3://bucket/model.pth", "give a local path"), ("file", "is a file; name NAME.pth"), ("d.pth", "is a folder")],
)
def test_an_export_to_an_impossible_place_is_refused(
    out: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pth(model_state(model_of(50)), tmp_path / "model.pth")
    (tmp_path / "file").touch()
    (tmp_path / "d.pth").mkdir()
    assert command_line.export(["model.pth", out]) == 1
    assert error in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.pth", "file", "model.pth"]


@pytest.mark.parametrize("device", ["mps", "nonsense"])
def test_a_missing_device_is_refused(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.pth").touch()  # the device is checked before the checkpoint is read
    code, _, err = run(tmp_path / "model.pth", "--device", device, capsys=capsys)
    assert code == 1
    assert f"--device {device}: cannot be used here" in err


def test_an_export_without_a_tokenizer_names_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_huggingface(model_state(model_of(50)), tmp_path / "hf")
    assert command_line.export([str(tmp_path / "hf"), str(tmp_path / "copy")]) == 0
    assert "without a tokenizer: none is stored with it" in capsys.readouterr().out
    assert command_line.export([str(tmp_path / "nothing"), str(tmp_path / "other")]) == 1
    assert "nothing: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["caf\udce9"], "prompt: byte 0xe9 at character 3 is not UTF-8; write the prompt in UTF-8"),
        (
            ["x", "--seed", 99999999999999999999999],
            "--seed 99999999999999999999999: expected a whole number of 64 bits",
        ),
        (["x", "--seed", -(1 << 63) - 1], "--seed -9223372036854775809: expected a whole number of 64 bits"),
        (["x", "--max-tokens", -3], "--max-tokens -3: expected a whole number, at least 0"),
    ],
)
def test_an_impossible_argument_is_one_line(
    arguments: list[object], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(tmp_path / "model.pth", *arguments, "--device", "cpu", capsys=capsys)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {error}")
    assert err.count("\n") == 1


def test_fewer_than_no_tokens_are_refused() -> None:
    with pytest.raises(GenerationError, match="max_tokens -3: expected a whole number, at least 0"):
        next(sampling.generate_tokens(model_of(50), [1], max_tokens=-3))
