"""Full disks: a clear error, and the same command resumes when there is space again."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prep.build import build
from prep.config import PrepConfig
from prep.dataset.verification import verify
from prep.execution.task_store import WorkError, explained_write_errors

ROOT = Path(__file__).parents[3]
# A mount namespace of our own: a real file system of 600 KB, and no trace of it afterwards.
IN_NAMESPACE = ["unshare", "--map-root-user", "--mount"]
SCRIPT = """
set -u
mount -t tmpfs -o size=600k tmpfs "$1/disk" || exit 99
"$2" -m prep build "$1/recipe.yaml" out="$1/disk/out" workers="$3"; echo "first start: $?" >&2
mount -o remount,size=64m "$1/disk"
"$2" -m prep build "$1/recipe.yaml" out="$1/disk/out" workers="$3"; echo "second start: $?" >&2
cp -r "$1/disk/out" "$1/copy"
"""


def content(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and ".prep" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def can_mount() -> bool:
    try:
        return subprocess.run([*IN_NAMESPACE, "true"], capture_output=True, timeout=250).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs user and mount namespaces (Linux, `unshare`)")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_explained_and_the_build_resumes_afterwards(write_lines, tokenizer_folder, tmp_path, workers):
    for number in range(8):
        texts = [f"document {number} {row} " + "0123456789 床前明月光" * (row % 90) for row in range(150)]
        write_lines(tmp_path / "corpus" / f"{number}.jsonl", texts)
    values = {
        "out": str(tmp_path / "whole"),
        "tokenizer": str(tokenizer_folder),
        "sources": {"corpus": {"paths": str(tmp_path / "corpus")}},
        "unit_bytes": 1 << 16,
        "workers": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "disk").mkdir()
    script = [*IN_NAMESPACE, "sh", "-c", SCRIPT, "sh", str(tmp_path), sys.executable, str(workers)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=200)
    first, _, second = done.stderr.partition("first start: ")
    assert "disk/out: no space left on the disk" in first, done.stderr
    assert "make space" in first
    assert "run the same command again: finished work is kept" in first
    assert second.startswith("1\n")
    assert second.endswith("second start: 0\n"), second
    verify(tmp_path / "copy")
    build(PrepConfig.model_validate(values))
    assert content(tmp_path / "copy") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "error",
    [BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), RuntimeError("can't start new thread")],
)
def test_a_limit_of_the_system_is_explained(error: Exception, tmp_path: Path) -> None:
    message = (
        r"^(Res|can).*: the limit of processes and threads .*, or set `workers` lower; finished work is kept, run the"
    )
    with pytest.raises(WorkError, match=message), explained_write_errors(tmp_path):
        raise error
