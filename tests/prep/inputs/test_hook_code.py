"""The code of a hook: its module and the user's own modules that it imports."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from prep.config import SourceConfig
from prep.inputs.hook_code import code_digest
from prep.inputs.hooks import source_identity

FILES = {
    "hooks_of_code": "import json\nimport numpy\nimport helper_of_code\ndef keep(record): return helper_of_code.GOOD\n",
    "helper_of_code": "from package_of_code import inner as renamed\nGOOD = renamed.GOOD\n",
    "package_of_code/__init__": "",
    "package_of_code/inner": "def late():\n    from .sibling import late_too\nGOOD = True\n",
    "package_of_code/sibling": "late_too = 1\n",
    "package_of_code/unused": "x = 1\n",
    "alone_of_code": "import os.path\nimport streaming_rwkv.shards\ndef keep(record): return True\n",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "package_of_code", raising=False)
    (tmp_path / "package_of_code").mkdir()
    for name, content in FILES.items():
        monkeypatch.delitem(sys.modules, name.replace("/", "."), raising=False)  # another test's, in another folder
        (tmp_path / f"{name}.py").write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("edited", "is_noticed"),
    [
        ("hooks_of_code", True),
        ("helper_of_code", True),
        ("package_of_code/__init__", True),
        ("package_of_code/inner", True),
        ("package_of_code/sibling", True),  # imported by a function, when it runs
        ("package_of_code/unused", False),
        ("alone_of_code", False),
    ],
)
def test_an_edited_module_of_the_users_own_is_noticed(modules: Path, edited: str, is_noticed: bool) -> None:
    config = SourceConfig(paths=["x"], filter="hooks_of_code:keep")
    before = source_identity(config)["filter"]
    (modules / f"{edited}.py").write_text(FILES[edited] + "# edited\n")
    assert (source_identity(config)["filter"] != before) == is_noticed


def test_a_hook_without_helpers_has_the_digest_of_its_file(modules: Path) -> None:
    expected = hashlib.sha256(FILES["alone_of_code"].encode()).hexdigest()
    assert code_digest("alone_of_code") == expected
