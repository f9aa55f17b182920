"""Token ids are cut into pieces, with literals that can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest

from prep.stages import buckets
from streaming_rwkv.tokenizer import TokenBatch

BOS, EOS = 8, 9


def batch_of(*documents: list[int]) -> TokenBatch:
    return TokenBatch(
        ids=np.array([token for document in documents for token in document], np.uint32),
        offsets=np.cumsum([0, *map(len, documents)]),
    )


def test_a_document_is_stored_between_bos_and_eos():
    tokens, offsets = buckets.stored_tokens(batch_of([1, 2, 3], [], [4]), bos_id=BOS, eos_id=EOS)
    assert tokens.tolist() == [8, 1, 2, 3, 9, 8, 9, 8, 4, 9]
    assert offsets.tolist() == [0, 5, 7, 10]


def test_a_long_document_is_cut_and_the_pieces_share_one_token():
    tokens, _ = buckets.stored_tokens(batch_of([1, 2, 3, 4, 5, 6]), bos_id=BOS, eos_id=EOS)
    pieces = buckets.cut(np.array([7]), largest=3)
    assert pieces.starts.tolist() == [0, 3, 6]
    assert pieces.inputs.tolist() == [3, 3, 1]
    stored = [
        tokens[start : start + inputs + 1].tolist() for start, inputs in zip(pieces.starts, pieces.inputs, strict=True)
    ]
    assert stored == [[8, 1, 2, 3], [3, 4, 5, 6], [6, 9]]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [(1, [1]), (3, [3]), (4, [3, 1]), (6, [3, 3]), (7, [3, 3, 1])],
)
def test_pieces_have_the_largest_length_and_a_rest(inputs, expected):
    assert buckets.cut(np.array([inputs]), largest=3).inputs.tolist() == expected


def test_pieces_of_several_documents_keep_their_order():
    pieces = buckets.cut(np.array([2, 5, 1]), largest=2)
    assert pieces.documents.tolist() == [0, 1, 1, 1, 2]
    assert pieces.starts.tolist() == [0, 0, 2, 4, 0]
    assert pieces.inputs.tolist() == [2, 2, 2, 1, 1]


def test_truncation_keeps_the_first_piece_only():
    pieces = buckets.cut(np.array([2, 5, 1]), largest=2, truncate=True)
    assert pieces.inputs.tolist() == [2, 2, 1]


@pytest.mark.parametrize(("length", "bucket"), [(1, 0), (255, 0), (256, 0), (257, 1), (512, 1), (513, 2), (2048, 2)])
def test_both_bounds_belong_to_a_bucket(length, bucket):
    assert buckets.bucket_of(np.array([length]), edges=[256, 512, 2048]).tolist() == [bucket]


def test_bytes_of_pieces_are_those_of_their_targets():
    # Five tokens of 1, 2, 3, 4, 5 bytes; inputs bos t1 t2 | t3 t4 t5, targets t1 t2 t3 | t4 t5 eos.
    batch = batch_of([1, 2, 3, 4, 5])
    pieces = buckets.cut(np.array([6]), largest=3)
    token_bytes = np.array([0, 1, 2, 3, 4, 5, 0, 0, 0, 0], np.uint32)
    found = buckets.piece_bytes(pieces, batch, text_bytes=np.array([15]), token_bytes=token_bytes)
    assert found.tolist() == [1 + 2 + 3, 4 + 5]


def test_a_piece_with_nothing_but_the_end_has_no_bytes():
    batch = batch_of([1, 1, 1])
    pieces = buckets.cut(np.array([4]), largest=3)
    found = buckets.piece_bytes(pieces, batch, text_bytes=np.array([3]), token_bytes=np.array([0, 1], np.uint32))
    assert found.tolist() == [3, 0]


def test_bytes_add_up_where_the_tokenizer_changes_the_text():
    # Ids have 2 bytes each, but the text had 7: shared out 2:2:2 they become 5 and 2.
    batch = batch_of([1, 1, 1])
    pieces = buckets.cut(np.array([4]), largest=2)
    found = buckets.piece_bytes(pieces, batch, text_bytes=np.array([7]), token_bytes=np.array([0, 2], np.uint32))
    assert found.tolist() == [5, 2]


def test_bytes_of_whole_documents_are_their_texts():
    pieces = buckets.cut(np.array([3, 1]), largest=4)
    found = buckets.piece_bytes(pieces, batch_of([1, 2], []), text_bytes=np.array([9, 0]), token_bytes=None)
    assert found.tolist() == [9, 0]
