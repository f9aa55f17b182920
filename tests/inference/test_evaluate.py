"""The loss of a checkpoint on a data set: document by document, the plain cross-entropy."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streaming_rwkv.config import UserError
from streaming_rwkv.data.shard_set import open_shard_set
from streaming_rwkv.distributed import rank_environment
from streaming_rwkv.inference.command_line import evaluate as main
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.model.state import model_state
from streaming_rwkv.model.weights import read_model, write_pth
from streaming_rwkv.storage import open_store
from streaming_rwkv.tokenizer import load_tokenizer
from tests.small_data import pack_of

TRAIN = {("web", 1, 16): 3}
VALIDATION = {("web", 1, 16): 5, ("web", 17, 32): 2, ("code", 1, 16): 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Path]) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "set", TRAIN, validation=VALIDATION)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.pth", vocab_size=97)


def write_model(path: Path, *, vocab_size: int) -> Path:
    model = RWKV7(RWKV7Config(vocab_size=vocab_size, hidden_size=64, num_layers=1))
    initialize(model, seed=1)
    with torch.no_grad():  # the head is 0 at first, and every token as likely as the others
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    write_pth(model_state(model), path, dtype=torch.float32)
    return path


@torch.no_grad()
def by_document(checkpoint: Path) -> dict[str, float]:
    """nats per target and bits per byte, over all and of one source."""
    model = read_model(checkpoint)
    sums: Counter[str] = Counter()
    for number, ((source, lower, upper), packs) in enumerate(VALIDATION.items()):
        for i in range(packs):
            pack = pack_of(100 + number, i, lower=lower, upper=upper)
            stored = torch.from_numpy(pack["tokens"].astype("int64"))
            for piece in stored.split(pack["lengths"].tolist()):
                logits = model(piece[None, :-1])[0]
                nll = torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
                for group in ("all", source):
                    sums[f"{group} nll"] += nll
                    sums[f"{group} targets"] += len(piece) - 1
            for group in ("all", source):
                sums[f"{group} bytes"] += int(pack["bytes"].sum())
    return {
        "validation/loss/all": sums["all nll"] / sums["all targets"],
        "validation/loss/source/web": sums["web nll"] / sums["web targets"],
        "validation/bits_per_byte/all": sums["all nll"] / math.log(2) / sums["all bytes"],
    }


def test_the_loss_is_the_mean_over_documents(data: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name, value in by_document(checkpoint).items():
        assert found[name] == pytest.approx(value, rel=1e-5)
    assert main([str(checkpoint), str(data)]) == 0
    assert f"{found['validation/bits_per_byte/bucket/17-32']:.4f}" in capsys.readouterr().out


def test_a_launchers_variables_change_nothing(
    data: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Streaming would read the part of one rank, and wait for the others."""
    arguments = [str(checkpoint), str(data), "--json"]
    assert main(arguments) == 0
    expected = capsys.readouterr().out
    for name, value in (rank_environment(1, 2, port=1) | {"LOCAL_WORLD_SIZE": "x"}).items():
        monkeypatch.setenv(name, value)
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected


def test_data_on_object_storage_and_a_part_of_it_can_be_evaluated(
    data: Path, checkpoint: Path, s3_place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from prep.dataset.upload import upload

    upload(data, s3_place)
    found = []
    for place in (str(data), s3_place):
        assert main([str(checkpoint), place, "--split", "train", "--packs-per-stream", "2", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert main([str(checkpoint), str(data), "--split", "train", "--json"]) == 0
    assert found[0] != json.loads(capsys.readouterr().out)

    store = open_store(s3_place)
    store.delete(["train/web/1-16/shard.00000.mds.zstd"])
    store.close()
    assert main([str(checkpoint), s3_place, "--split", "train"]) == 1
    assert "train/web/1-16/shard.00000.mds.zstd (missing); restore them, or build again" in capsys.readouterr().err


def test_a_checkpoint_and_data_that_do_not_match_are_refused(
    data: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write_data_set: Callable[..., Path],
) -> None:
    small = write_model(tmp_path / "small.pth", vocab_size=50)
    assert main([str(small), str(data)]) == 1
    assert "its tokenizer has 97 ids, the model has 50" in capsys.readouterr().err

    (tmp_path / "run").mkdir()
    write_model(tmp_path / "run" / "model.pth", vocab_size=65536)
    load_tokenizer("rwkv-world").save(tmp_path / "run" / "tokenizer")
    assert main([str(tmp_path / "run" / "model.pth"), str(data)]) == 1
    assert "the checkpoint was trained with 'rwkv-world'" in capsys.readouterr().err

    without = write_data_set(tmp_path / "without", TRAIN)
    assert main([str(checkpoint), str(without)]) == 1
    assert "has no validation packs; choose another --split" in capsys.readouterr().err
    assert main([str(checkpoint), str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), str(data)]) == 1
    assert "nothing: no such file or folder; give a run's save folder" in capsys.readouterr().err


def test_loss_by_position_adds_up_to_the_total(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoint), str(data), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    losses, targets = (
        {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
        for prefix in ("validation/loss_by_position/", "validation/targets_by_position/")
    )
    assert list(losses) == ["1", "2", "3-4", "5-8", "9-16", "17-32"]
    mean = sum(losses[name] * targets[name] for name in losses) / sum(targets.values())
    assert mean == pytest.approx(metrics["validation/loss/all"], rel=1e-9)  # float64 sums in another order
    assert main([str(checkpoint), str(data)]) == 0
    assert "position 17-32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("below", "found"), [("set", "which is a data set"), ("set/cache", "which is a data set"), ("run", "a run's save")]
)
def test_a_cache_is_no_part_of_a_data_set_or_a_run(
    data: Path, checkpoint: Path, tmp_path: Path, below: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set" / "tokenizer").mkdir(parents=True)
    (tmp_path / "set" / "manifest.json").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    assert main([str(checkpoint), str(data), "--cache", str(tmp_path / below)]) == 1
    error = capsys.readouterr().err
    assert found in error
    assert error.endswith("; give another `--cache`\n")
    with pytest.raises(UserError, match=found):
        open_shard_set(data, cache=tmp_path / below, splits=["train"], timeout_seconds=9, fetch=True)
    assert set(tmp_path.rglob("*")) == before


def test_a_cache_in_a_run_and_one_that_is_used_again_are_no_fault(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for _ in range(2):
        assert main([str(checkpoint), str(data), "--cache", str(tmp_path / "run" / "cache")]) == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["data", "--packs-per-stream", "0"],
            "argument --packs-per-stream: found '0', expected a whole number, at least 1",
        ),
        (["--tasks", "piqa", "--limit", "-3"], "argument --limit: found '-3', expected a whole number, at least 1"),
        (["--tasks", "piqa", "--shots", "-1"], "argument --shots: found '-1', expected a whole number, at least 0"),
        (["data", "--limit", "3"], "--limit is for tasks; name them with --tasks"),
        ([], "give a data set, or --tasks"),
    ],
)
def test_evaluate_refuses_arguments_that_say_nothing(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["model.pth", *arguments])
    assert error in capsys.readouterr().err
