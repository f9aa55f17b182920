"""Places of outputs in object storage, as `outputs` has those in folders."""

from __future__ import annotations

from contextlib import nullcontext, suppress

from streaming_rwkv.config import UserError
from streaming_rwkv.outputs import MARK_NAME
from streaming_rwkv.shards import MANIFEST_NAME, TOKENIZER_FOLDER
from streaming_rwkv.storage import StorageError, Store


def check_outside_in_store(store: Store, *, what: str, remedy: str) -> None:
    """Check that the objects of an output are not in a data set or a checkpoint in object storage.

    Prefixes above the output's that may not be read are not looked at.

    Raises:
        UserError: they are in one, at any depth.
        StorageError: the server fails.
    """
    for at in store.with_parents():
        kind = None
        with nullcontext() if at == store else suppress(StorageError):
            kind = _kind_in_store(at)
        if kind is not None:
            raise UserError(f"{store.location}: this {what} would be in {at.location}, which is {kind}; {remedy}")


def _kind_in_store(store: Store) -> str | None:
    if store.find(MARK_NAME):
        return "a checkpoint"
    is_data_set = store.find(MANIFEST_NAME) and any(True for _ in store.walk(f"{TOKENIZER_FOLDER}/"))
    return "a data set" if is_data_set else None
