"""Documents to pieces: bos and eos, lengths, buckets, and cuts of long documents.

N documents, P pieces. A document of n text tokens is stored as [bos, t1 … tn, eos]; its length is its number of
inputs, n + 1. A piece is a run of stored tokens; consecutive pieces share one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.ragged import gather
from streaming_rwkv.shards import offsets_of
from streaming_rwkv.tokenizer import TokenBatch


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The locations of P pieces in their documents."""

    documents: NDArray[np.int64]  # (P,) index of the document
    starts: NDArray[np.int64]  # (P,) position of the first input in the document
    inputs: NDArray[np.int64]  # (P,) = targets

    def __len__(self) -> int:
        return len(self.documents)


def stored_tokens(
    batch: TokenBatch, *, bos_id: int, eos_id: int, dtype: type[np.unsignedinteger[Any]] = np.uint32
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return all documents with bos and eos, one after another, and their (N + 1,) offsets."""
    count = len(batch)
    offsets = batch.offsets + 2 * np.arange(count + 1)
    tokens = np.empty(offsets[-1], dtype)
    is_text = np.ones(len(tokens), np.bool_)
    is_text[offsets[:-1]] = False
    is_text[offsets[1:] - 1] = False
    tokens[is_text] = batch.ids
    tokens[offsets[:-1]] = bos_id
    tokens[offsets[1:] - 1] = eos_id
    return tokens, offsets


def cut(inputs: NDArray[np.int64], *, largest: int, truncate: bool = False) -> Pieces:
    """Cut documents into pieces of at most `largest` inputs; the last piece of a document is the remainder.

    Args:
        inputs: (N,) the documents' lengths.
        truncate: keep the first piece only. It ends without eos, so that no false end is learned.
    """
    counts = np.ones_like(inputs) if truncate else -(-inputs // largest)
    documents = np.repeat(np.arange(len(inputs)), counts)
    first = offsets_of(counts)[:-1]
    starts = (np.arange(len(documents)) - first[documents]) * largest
    return Pieces(documents=documents, starts=starts, inputs=np.minimum(inputs[documents] - starts, largest))


def bucket_of(inputs: NDArray[np.int64], *, edges: Sequence[int]) -> NDArray[np.int64]:
    """Return the (P,) index of the bucket of each length."""
    return np.searchsorted(np.asarray(edges), inputs, side="left")


def piece_bytes(
    pieces: Pieces, batch: TokenBatch, *, text_bytes: NDArray[np.int64], token_bytes: NDArray[np.uint32] | None
) -> NDArray[np.int64]:
    """Return the (P,) UTF-8 bytes of text behind the targets of each piece; they add up to those of the document.

    Args:
        text_bytes: (N,) bytes of each document's text.
        token_bytes: bytes behind each id, needed if a document is cut. If a tokenizer changes the text, so that these
            do not add up to the text's bytes, the text's bytes are distributed in proportion to them.
    """
    lengths = np.diff(batch.offsets)
    found = text_bytes[pieces.documents]
    ends = pieces.starts + pieces.inputs
    (parts,) = np.nonzero((pieces.starts > 0) | (ends <= lengths[pieces.documents]))
    if not len(parts):
        return found
    assert token_bytes is not None
    # Only ids of documents that are cut are looked up: most documents are whole.
    cut_documents, document = np.unique(pieces.documents[parts], return_inverse=True)
    lengths = lengths[cut_documents]
    first = offsets_of(lengths)
    weights = offsets_of(token_bytes[gather(batch.ids, batch.offsets[cut_documents], lengths)])
    totals = np.diff(weights[first])

    def bytes_before(place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes of its document before the given target of each part; the end, without text, is the last."""
        before = weights[first[document] + np.minimum(place, lengths[document])] - weights[first[document]]
        total = totals[document]
        return (before * found[parts] + total // 2) // np.maximum(total, 1)

    found[parts] = bytes_before(ends[parts]) - bytes_before(pieces.starts[parts])
    return found
