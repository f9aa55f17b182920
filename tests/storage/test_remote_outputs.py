"""Outputs in object storage are kept out of data sets and checkpoints, as outputs in folders are."""

from __future__ import annotations

import contextlib

import pytest

from streaming_rwkv.config import UserError
from streaming_rwkv.outputs import CHECKPOINTS, MARK_NAME
from streaming_rwkv.remote_outputs import check_outside_in_store
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


def test_a_place_in_a_checkpoint_is_refused(s3_place: str) -> None:
    checkpoint = f"{CHECKPOINTS}/step-00000010"
    with contextlib.closing(open_store(s3_place)) as store:
        store.put_bytes(b"{}", f"{checkpoint}/{MARK_NAME}")
    check(s3_place)
    with pytest.raises(
        UserError, match=f"this run would be in {s3_place}/{checkpoint}, which is a checkpoint; give it"
    ):
        check(f"{s3_place}/{checkpoint}/run")
