"""Places of outputs in object storage, as `outputs` has those in folders."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext, suppress

from streaming_rwkv.config import UserError
from streaming_rwkv.outputs import CHECKPOINTS, LARGEST_WRITER_BYTES, LOGS, MARK_NAME, RUN_FOLDERS, WRITER
from streaming_rwkv.shards import MANIFEST_NAME, TOKENIZER_FOLDER
from streaming_rwkv.storage import StorageError, Store


def check_run_in_store(store: Store) -> None:
    """Check that a run may write its objects to a store: a new or its earlier one, or one with other objects.

    Raises:
        UserError: it is in a data set, a checkpoint or another run, or has objects of other programs that the run would
            replace.
        StorageError: the server fails.
    """
    remedy = "give this run another `save_remote`"
    check_outside_in_store(store, what="run", remedy=remedy)
    claims = store.find(WRITER) is not None
    if claims and _is_claim(store):
        return
    replaced = [WRITER] if claims else []
    if not _has(store, CHECKPOINTS):
        replaced += [name for name in LOGS if store.find(name) or _has(store, name)]
    if replaced:
        raise UserError(
            f"{store.location}: has {', '.join(replaced)}, but not from a run, which would write objects of these "
            f"names; {remedy}, or move them away"
        )


def _is_claim(store: Store) -> bool:
    """Return True if the claim in a store is that of a run, not a file of the same name."""
    content = store.get_bytes(WRITER, most=LARGEST_WRITER_BYTES)
    try:
        claim = json.loads(content)
    except ValueError:
        return False
    return isinstance(claim, dict) and {"run", "host"} <= claim.keys()


def _has(store: Store, folder: str) -> bool:
    return any(True for _ in store.walk(f"{folder}/"))


def check_outside_in_store(store: Store, *, what: str, remedy: str) -> None:
    """Check that the objects of an output are not in a data set, a checkpoint or a folder of a run in object storage.

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
    if store.find(MANIFEST_NAME) and _has(store, TOKENIZER_FOLDER):
        return "a data set"
    above = next(itertools.islice(store.with_parents(), 1, None), None)
    if above is not None and store.prefix.rpartition("/")[2] in RUN_FOLDERS and above.find(WRITER):
        return f"part of the run in {above.location}"
    return None
