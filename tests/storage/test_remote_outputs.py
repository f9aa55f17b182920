"""Outputs in object storage are kept out of data sets and checkpoints, as outputs in folders are."""

from __future__ import annotations

import contextlib

import pytest

from streaming_rwkv.config import UserError
from streaming_rwkv.outputs import CHECKPOINTS, MARK_NAME, WRITER
from streaming_rwkv.remote_outputs import check_outside_in_store, check_run_in_store
from streaming_rwkv.shards import MANIFEST_NAME, TOKENIZER_FOLDER
from streaming_rwkv.storage import open_store


def check(location: str) -> None:
    with contextlib.closing(open_store(location, timeout_seconds=20)) as store:
        check_outside_in_store(store, what="run", remedy="give it another")


@pytest.mark.parametrize("below", ["", "/run", "/train/web/1-16"])
def test_a_place_in_a_data_set_is_refused(s3_place: str, below: str) -> None:
    with contextlib.closing(open_store(s3_place)) as store:
        store.put_bytes(b"{}", f"data/{MANIFEST_NAME}")
        check(f"{s3_place}/data{below}")  # a manifest of something else
        store.put_bytes(b"{}", f"data/{TOKENIZER_FOLDER}/record.json")
    with pytest.raises(
        UserError, match=rf"{below}: this run would be in {s3_place}/data, which is a data set; give it"
    ):
        check(f"{s3_place}/data{below}")
    for free in (s3_place, f"{s3_place}/dat", f"{s3_place}/data2", "s3://tests"):
        check(free)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "tokenizer/tokenizer.json"])
def test_objects_of_other_programs_are_not_replaced_by_a_run(s3_place: str, name: str) -> None:
    with contextlib.closing(open_store(s3_place)) as store:
        store.put_bytes(b"mine", name)
        with pytest.raises(
            UserError, match=rf"{s3_place}: has {name.partition('/')[0]}, but not from a run, .*; give "
        ):
            check_run_in_store(store)
        store.put_bytes(b"mine", WRITER)
        with pytest.raises(UserError, match=rf"{s3_place}: has writer.json, .*, but not from a run"):
            check_run_in_store(store)
        store.put_bytes(b'{"run": "77aa", "host": "a"}', WRITER)
        check_run_in_store(store)


@pytest.mark.parametrize("below", ["checkpoints", "checkpoints/mine", "tokenizer", "tensorboard/x"])
def test_a_place_that_a_run_keeps_for_itself_is_refused(s3_place: str, below: str) -> None:
    check(f"{s3_place}/{below}")
    with contextlib.closing(open_store(s3_place)) as store:
        store.put_bytes(b"{}", WRITER)
    check(f"{s3_place}/other")
    with pytest.raises(
        UserError, match=f"this run would be in {s3_place}/{below.partition('/')[0]}, which is part of the"
    ):
        check(f"{s3_place}/{below}")


def test_a_place_in_a_checkpoint_is_refused(s3_place: str) -> None:
    checkpoint = f"{CHECKPOINTS}/step-00000010"
    with contextlib.closing(open_store(s3_place)) as store:
        store.put_bytes(b"{}", f"{checkpoint}/{MARK_NAME}")
    check(s3_place)
    with pytest.raises(
        UserError, match=f"this run would be in {s3_place}/{checkpoint}, which is a checkpoint; give it"
    ):
        check(f"{s3_place}/{checkpoint}/run")
