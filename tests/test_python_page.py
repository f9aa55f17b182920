"""docs/python.md: its snippets run, one after another, and it names all public names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import prep
import streaming_rwkv

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    lines = [json.dumps({"text": f"Once upon a time there were {n} foxes. " * (1 + n % 9)}) for n in range(120)]
    (tmp_path / "mine" / "texts.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(snippets) == 5
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    out = capsys.readouterr().out
    assert "train/mine/1-256" in out
    assert "steps of 2 packs" in out
    assert "Once upon a time there were" in out
    assert "torch.Size([1, 32, 2, 64]) torch.Size([1, 2, 64, 64])" in out


@pytest.mark.parametrize("package", [prep, streaming_rwkv], ids=lambda package: package.__name__)
def test_the_page_names_everything_that_is_public(package) -> None:
    results = {"BuildResult", "UploadResult", "Batch", "Manifest", "StepDataset", "Tokenizer"}  # of what is named
    missing = [name for name in package.__all__ if name not in results and not re.search(rf"\b{name}\b", TEXT)]
    assert missing == []
