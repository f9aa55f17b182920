"""Outputs stay apart from what others have written."""

from __future__ import annotations

from pathlib import Path

import pytest

from streaming_rwkv.config import UserError
from streaming_rwkv.outputs import LOGS, RUN_FOLDERS, check_save_folder


@pytest.mark.parametrize("name", sorted({*LOGS, *RUN_FOLDERS} - {"checkpoints"}))
def test_files_of_other_programs_are_not_replaced_by_a_run(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    check_save_folder(folder)  # a new one
    folder.mkdir()
    (folder / "train.yaml").touch()
    check_save_folder(folder)
    (folder / name).touch()
    with pytest.raises(UserError, match=rf"project: has {name}, but not from a run, .*; give .* or move them away"):
        check_save_folder(folder)
    (folder / ".lock").touch()  # as a run that has ended before its first checkpoint
    check_save_folder(folder)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints",
        "checkpoints/step-00000010",
        "tensorboard",
        "cache",
        "cache/0123/train",
        "tokenizer",
        "metrics.jsonl",
    ],
)
def test_a_run_with_links_is_not_resumed(name: str, tmp_path: Path) -> None:
    """It may be a stranger's: it would write and delete where they point to."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / name).parent.mkdir(parents=True)
    (run / ".lock").touch()
    (run / "wandb").symlink_to(elsewhere)  # a tracker's
    check_save_folder(run)
    (run / name).symlink_to(elsewhere)
    with pytest.raises(UserError, match=rf"run/{name}: found a symbolic link, .*; replace it .*another `save_folder`"):
        check_save_folder(run)


@pytest.mark.parametrize("marks", [["checkpoints/step-00000001"], [".lock", "config.yaml"]])
@pytest.mark.parametrize("below", [*RUN_FOLDERS, "checkpoints/mine"])
def test_a_run_is_not_saved_in_what_another_keeps_for_itself(marks: list[str], below: str, tmp_path: Path) -> None:
    for name in marks:
        (tmp_path / name).mkdir(parents=True)
    check_save_folder(tmp_path)
    check_save_folder(tmp_path / "other")
    folder = below.partition("/")[0]
    with pytest.raises(UserError, match=rf"this save folder would be in .*/{folder}, which is part of the run in "):
        check_save_folder(tmp_path / below)


def test_a_run_is_not_saved_in_a_data_cache(tmp_path: Path) -> None:
    for name in (".lock", "manifest.json"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"has a manifest\.json, as a data set or a data cache; give this run another"):
        check_save_folder(tmp_path)


def test_a_link_in_place_of_the_cache_is_refused_at_the_first_start(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cache").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"run/cache: found a symbolic link, .*, or set `data\.cache`"):
        check_save_folder(tmp_path / "run")
