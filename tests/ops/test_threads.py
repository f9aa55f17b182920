"""The threads of the C++ kernels: torch's, and without OpenMP their own."""

from __future__ import annotations

import ctypes
import sys
import threading

import pytest
import torch

from streaming_rwkv.ops import threads, wkv7
from streaming_rwkv.ops.testing import make_case, run

Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="OpenMP of other systems has no GOMP_parallel")
def test_each_call_gets_the_same_team() -> None:
    found = threads.torch_threads()
    assert found.count == 2
    assert found.parallel
    parallel = ctypes.CFUNCTYPE(None, Task, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(found.parallel)
    teams = []
    for _ in range(2):
        team: set[int] = set()
        parallel(Task(lambda _, team=team: team.add(threading.get_native_id())), None, found.count, 0)
        teams.append(team)
    assert teams[0] == teams[1]
    assert len(teams[0]) == 2
    assert threading.get_native_id() in teams[0]


def test_results_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([300, 200, 17])
    expected = run(wkv7, case)
    monkeypatch.setattr(threads, "_forked", True)
    assert threads.torch_threads().parallel is None
    found = run(wkv7, case)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
