"""docs/migration.md: the commands are valid, and have the effects that the tables state."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Event, Timestamp

from streaming_rwkv.config import load_config
from streaming_rwkv.train.__main__ import main
from streaming_rwkv.train.callbacks.validation import evaluation_interval
from streaming_rwkv.train.config import RunConfig
from streaming_rwkv.train.optimizer import lr_multiplier
from streaming_rwkv.train.prepare import PreparedRun, prepare

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
SETTING = re.compile(r"[a-z_]+(?:\.[a-z0-9_]+)+=[^\s…`]+")


def documented_command() -> list[str]:
    (command,) = (block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "processes=" in block)
    return shlex.split(command.replace("\\\n", " "))


def table_rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("| `")
    ]


@pytest.fixture(scope="module")
def data(build_data_set: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in all eight buckets, 4,096 tokens to a pack, as the page builds it."""
    return build_data_set(
        tmp_path_factory.mktemp("migration"), sources=["web"], pack_tokens=4096, documents_per_bucket=60
    )


@pytest.fixture(scope="module")
def here(data: Path) -> list[str]:
    """Overrides of the command for a test: other locations, and no weights to start from."""
    folder = data.parent
    return [
        f"data.path={data}", f"data.cache={folder / 'cache'}", f"save_folder={folder / 'run'}",
        "model.init_from=null", "model.preset=0.1B", "data.workers=0", "device=cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(here: list[str]) -> PreparedRun:
    program, command, yaml, processes, *overrides = documented_command()
    assert (program, command, processes) == ("streaming-rwkv", "train", "processes=6")
    return prepare(load_config(RunConfig, ROOT / yaml, overrides=[*overrides, *here]), world_size=6, fetch=True)


def test_the_documented_command_shows_the_run(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, _, yaml, *overrides = documented_command()
    assert main([str(ROOT / yaml), *overrides, *here, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of 18 packs" in shown
    assert "6, each with 3 packs of a step, 3 in a microbatch" in shown


def test_options_m_and_M_choose_the_bucket(prepared: PreparedRun) -> None:
    (stage,) = prepared.plan.stages
    trained = {s.bucket for s, rate in zip(prepared.plan.streams, stage.rates, strict=True) if rate > 0}
    assert trained == {"1-256"}
    packs = set(prepared.plan.packs(0, 10).ravel().tolist())
    (stream,) = (s for s in prepared.plan.streams if s.bucket == "1-256")
    first = int(prepared.plan.first_pack[prepared.plan.streams.index(stream)])
    assert packs <= set(range(first, first + stream.packs))


def test_options_b_and_n_are_the_tokens_of_a_step(prepared: PreparedRun) -> None:
    pack_tokens = prepared.shard_set.manifest.pack_tokens
    assert prepared.plan.batch_packs * pack_tokens == 48 * 256 * 6 == 73_728
    assert prepared.plan.batch_packs // 6 * pack_tokens == 48 * 256


def test_option_w_is_the_warm_up(prepared: PreparedRun) -> None:
    """The warm-up ends in steps of whole packs; after it, the cosine has hardly begun to fall."""

    def rate(steps: int) -> float:
        return lr_multiplier(
            prepared.config.optimizer, tokens_seen=steps * 48 * 256 * 6, total_tokens=prepared.total_tokens
        )

    assert rate(0) == pytest.approx(0.01)
    assert rate(50) == pytest.approx(0.505)
    assert rate(99) == pytest.approx(0.9901)
    assert rate(100) == pytest.approx(1)
    assert rate(101) == pytest.approx(1, abs=1e-5)


def test_option_v_is_the_interval_of_validations(prepared: PreparedRun) -> None:
    assert prepared.plan.steps > 13_000
    due = evaluation_interval(prepared.config.evaluation.interval_steps, last_step=prepared.plan.steps)

    def at(step: int) -> Any:
        return SimpleNamespace(timestamp=Timestamp(batch=step))

    steps = [step for step in range(1, prepared.plan.steps + 1) if due(at(step), Event.BATCH_END)]
    assert steps == [5000, 10_000, prepared.plan.steps]


def test_every_setting_that_the_page_names_exists() -> None:
    rows = table_rows(PAGE)
    assert len(rows) == 14
    settings = [setting for row in rows for setting in SETTING.findall(row[1]) if "stages=" not in setting]
    assert len(settings) >= 8
    for setting in settings:
        overrides = ["data.batch_packs=null"] if "batch_tokens" in setting else []
        if "lr" in setting:  # valid together alone
            overrides = ["optimizer.lr_final=0"]
        load_config(RunConfig, ROOT / "yamls" / "tiny_cpu.yaml", overrides=[*overrides, setting])


def test_a_rate_that_rises_is_refused_as_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    rising = ["optimizer.lr=1e-4", "optimizer.lr_final=5e-4"]
    assert main([str(ROOT / "yamls" / "tiny_cpu.yaml"), *rising, "--dry-run"]) == 1
    assert "the rate must not rise" in capsys.readouterr().err
