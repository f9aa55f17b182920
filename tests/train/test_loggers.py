"""A run's output: lines in a log file, and a progress bar only on a terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from composer.loggers.progress_bar_logger import ProgressBarLogger

from streaming_rwkv.config import load_config
from streaming_rwkv.train.config import LogConfig, RunConfig
from streaming_rwkv.train.loggers import omit_settings, shows_progress_bar

DEMO = Path(__file__).parents[2] / "yamls" / "demo.yaml"


def test_a_progress_bar_is_drawn_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shows_progress_bar(LogConfig(progress_bar=True))  # pytest's standard error is a file
    main, side = os.openpty()
    with open(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert shows_progress_bar(LogConfig(progress_bar=True))
        assert not shows_progress_bar(LogConfig())
        monkeypatch.undo()
    os.close(main)


def test_the_demo_prints_lines() -> None:
    assert not load_config(RunConfig, DEMO).log.progress_bar


def test_the_progress_bar_leaves_out_the_settings_of_composer(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBarLogger()
    bar.log_hyperparameters({"composer_commit_hash": "None"})
    omit_settings([bar])
    assert bar.hparams_already_logged_to_console
