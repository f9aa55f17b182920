"""Metrics as lines of JSON, which a resumed run rewinds to its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streaming_rwkv.train.callbacks.json_lines import JSONLines


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rewind_removes_lines_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JSONLines(path)
    for step in (1, 2, 3, 4):
        lines.log_metrics({"loss": step / 2})
        lines.flush(step)
    lines.log_metrics({"validation": 9.0})
    lines.flush(2)
    lines.rewind(2)
    assert lines_of(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 2, "validation": 9.0}]
    lines.rewind(0)
    assert lines_of(path) == []


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}garbage', "{}", "17", "\0\0\0"])
def test_rewind_removes_a_line_that_a_kill_cut_off(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n' + torn)
    lines = JSONLines(path)
    lines.rewind(2)
    lines.log_metrics({"loss": 1.0})
    lines.flush(2)
    assert lines_of(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]


def test_rewind_without_a_file_does_nothing(tmp_path: Path) -> None:
    JSONLines(tmp_path / "metrics.jsonl").rewind(5)
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_written_as_numbers(tmp_path: Path) -> None:
    lines = JSONLines(tmp_path / "metrics.jsonl")
    lines.log_metrics({"a": torch.tensor(0.5), "b": torch.tensor([1, 2])})
    lines.flush(1)
    lines.flush(2)  # nothing since
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 0.5, "b": [1, 2]}]
