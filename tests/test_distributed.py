"""The variables by which a launcher tells a process its rank."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest

from streaming_rwkv.distributed import LauncherError, check_launcher, has_launcher, rank_environment

NAMES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COMPLETE = rank_environment(1, 2, port=29500)


@pytest.fixture(autouse=True)
def _without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def setenv(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
        {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"},  # of another program
        COMPLETE,
        {name: value for name, value in COMPLETE.items() if name != "NODE_RANK"},  # as torchrun sets them
        COMPLETE | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "1"},
    ],
)
def test_what_launchers_set_is_accepted(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, variables)
    check_launcher()
    assert {name: os.environ[name] for name in variables} == variables


def test_empty_variables_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, dict.fromkeys(NAMES, "") | {"LOCAL_RANK": " "})
    check_launcher()
    assert not has_launcher()
    assert set(NAMES) & set(os.environ) == set()


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE: found 'x' in the environment, expected a whole number, at least 1, as"),
        ({"RANK": "-1"}, "RANK: found '-1' in the environment, expected a whole number, at least 0, as"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE: found '0' in the environment, expected a whole number, at l"),
        ({"WORLD_SIZE": "01"}, "WORLD_SIZE: found '01' in the environment, expected a whole number"),
        (
            {"RANK": "3"},
            "RANK=3 in the environment, without LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT; "
            "expected all of them, as a launcher sets them, or none: unset the former",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 in the environment, without LOCAL_RANK, LOCAL_WORLD_SIZE, "),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 in the environment, without "),
        (
            COMPLETE | {"MASTER_PORT": ""},
            "RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2 in the environment, wi",
        ),
        (COMPLETE | {"RANK": "2"}, "RANK: found '2' in the environment, expected a whole number, from 0 to 1, below W"),
        (COMPLETE | {"LOCAL_RANK": "2"}, "LOCAL_RANK: found '2' in the environment, expected a whole number, from 0 "),
        (COMPLETE | {"MASTER_PORT": "65536"}, "MASTER_PORT: found '65536' in the environment, expected a whole number"),
        (COMPLETE | {"WORLD_SIZE": "3"}, "WORLD_SIZE: found 3 in the environment, expected a multiple of LOCAL_WORLD"),
    ],
)
def test_what_no_launcher_sets_is_refused_with_its_name(
    variables: Mapping[str, str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setenv(monkeypatch, variables)
    with pytest.raises(LauncherError) as raised:
        check_launcher()
    assert str(raised.value).startswith(error)
