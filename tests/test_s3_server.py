"""tools/s3_server.py as a program."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_ends_the_server_and_removes_its_folders(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.s3_server"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        folder = next(Path(line.partition("data: ")[2].split()[0]) for line in program.stdout if "data: " in line)
        (child,) = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        found = re.search(r"-s3\.localSocket=([^\0]*)/s3\.sock", Path(f"/proc/{child}/cmdline").read_text())
        assert found is not None
        assert Path(found[1]).is_dir()
        assert folder.parent == tmp_path
        program.send_signal(signal.SIGTERM)
        assert program.wait() == 0
    assert not Path(f"/proc/{child}").exists()
    assert not Path(found[1]).exists()
    assert [path for path in tmp_path.iterdir() if "test-ports" not in path.name] == []  # those outlive programs
