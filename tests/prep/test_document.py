"""Keys, hashes, split."""

from __future__ import annotations

import numpy as np

from prep.document import content_hashes, document_keys, in_validation, mix


def test_splitmix64_gives_its_published_sequence():
    """The first outputs of SplitMix64 with seed 1234567 (Vigna's reference implementation)."""
    steps = np.arange(1, 6, dtype=np.uint64)
    assert mix(steps, seed=1234567).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_keys_depend_on_source_file_and_row_alone():
    keys = document_keys("c4", "en/a.json", np.array([0, 1, 2]))
    assert len({*keys.tolist(), *document_keys("c4", "en/b.json", np.array([0, 1, 2])).tolist()}) == 6
    assert document_keys("c4", "en/a.json", np.array([2])).tolist() == keys[2:].tolist()
    assert document_keys("poems", "en/a.json", np.array([2])).tolist() != keys[2:].tolist()


def test_equal_texts_have_equal_hashes():
    hashes = content_hashes([b"a", b"b", b"a"], seed=0)
    assert hashes.shape == (3, 2)
    assert (hashes[0] == hashes[2]).all()
    assert (hashes[0] != hashes[1]).any()
    assert (content_hashes([b"a"], seed=1) != hashes[0]).any()


def test_the_split_takes_its_fraction():
    hashes = content_hashes([str(number).encode() for number in range(20_000)], seed=0)
    taken = in_validation(hashes, fraction=0.1)
    assert abs(taken.mean() - 0.1) < 0.01  # 5 standard deviations of a binomial of 20,000
    assert not in_validation(hashes, fraction=0.0).any()
    assert (in_validation(hashes, fraction=0.2) >= taken).all()  # a larger fraction only adds
