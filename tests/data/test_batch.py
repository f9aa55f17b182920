"""Packs to a row, by eye: inputs, targets, boundaries; and back to microbatches."""

import numpy as np

from streaming_rwkv.data.batch import IGNORED, NO_STREAM, blank_pack, collate, count_tokens, split_batch


def pack(tokens, lengths, text_bytes, stream):
    return {
        "tokens": np.array(tokens, np.uint16),
        "lengths": np.array(lengths, np.uint32),
        "bytes": np.array(text_bytes, np.uint32),
        "stream": stream,
    }


FIRST = pack([0, 11, 12, 9, 0, 13, 9], [4, 3], [5, 2], stream=2)  # 0 begins a document and 9 ends it
SECOND = pack([0, 14, 15, 16, 9], [5], [7], stream=0)


def test_a_piece_gives_all_but_its_last_as_inputs_and_all_but_its_first_as_targets():
    batch = collate([FIRST, SECOND])
    assert batch["tokens"].tolist() == [[0, 11, 12, 0, 13, 0, 14, 15, 16]]
    assert batch["targets"].tolist() == [[11, 12, 9, 13, 9, 14, 15, 16, 9]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 9]
    assert batch["pack_starts"].tolist() == [0, 5, 9]
    assert batch["streams"].tolist() == [2, 0]
    assert batch["text_bytes"].tolist() == [7, 7]
    assert count_tokens(batch) == {"total": 9, "loss_generating": 9}


def test_a_pack_with_one_document_of_one_token_is_a_batch():
    assert collate([pack([0, 9], [2], [0], stream=0)])["targets"].tolist() == [[9]]


def test_microbatches_are_cut_between_packs():
    one, two = split_batch(collate([FIRST, SECOND]), 1)
    alone = [collate([FIRST]), collate([SECOND])]
    for microbatch, expected in zip([one, two], alone, strict=True):
        for name, value in expected.items():
            found = microbatch[name]
            assert (found == value) if name == "num_targets" else found.tolist() == value.tolist()


def test_a_batch_of_fewer_packs_than_a_microbatch_stays_whole():
    assert len(split_batch(collate([FIRST, SECOND]), 3)) == 1


def test_a_blank_pack_counts_for_nothing():
    batch = collate([FIRST, blank_pack(0, np.uint16)])
    assert batch["targets"].tolist() == [[11, 12, 9, 13, 9, IGNORED]]
    assert batch["streams"].tolist() == [2, NO_STREAM]
    assert count_tokens(batch) == {"total": 6, "loss_generating": 5}
    assert split_batch(batch, 1)[1]["num_targets"] == 0
