"""The order of a stream's packs: each pack once a pass, and each shard in one stretch of it."""

import numpy as np

from streaming_rwkv.data.order import StreamOrder, permutation, stream_order


def test_each_pack_comes_once_in_every_pass():
    order = StreamOrder([3, 4, 2], key="k", block_shards=2)
    walk = order.take(0, 27)
    for pass_number in range(3):
        assert sorted(walk[9 * pass_number : 9 * pass_number + 9]) == list(range(9))


def test_passes_differ():
    order = StreamOrder([50], key="k", block_shards=1)
    assert order.take(0, 50).tolist() != order.take(50, 100).tolist()


def test_any_part_of_the_walk_can_be_taken_alone():
    order = StreamOrder([3, 4, 2, 5], key="k", block_shards=2)
    whole = order.take(0, 60)
    for start, stop in [(0, 1), (5, 9), (13, 15), (14, 42), (7, 60), (20, 20)]:
        assert order.take(start, stop).tolist() == whole[start:stop].tolist()


def test_the_order_depends_on_the_key_alone():
    shards = [7, 7, 7]
    first = StreamOrder(shards, key="17/train/c4/1-256", block_shards=2).take(0, 42)
    assert first.tolist() == StreamOrder(shards, key="17/train/c4/1-256", block_shards=2).take(0, 42).tolist()
    assert first.tolist() != StreamOrder(shards, key="18/train/c4/1-256", block_shards=2).take(0, 42).tolist()


def test_the_permutation_is_fixed_for_all_time():
    # A literal: another numpy, or another machine, must give this very order, or no old run could be resumed.
    assert permutation(10, key="a stream").tolist() == [6, 7, 2, 8, 5, 1, 4, 9, 3, 0]


def test_a_cache_of_one_block_of_shards_fetches_each_shard_once_a_pass():
    packs_per_shard, shards, block = 10, 30, 4
    order = StreamOrder([packs_per_shard] * shards, key="k", block_shards=block)
    walk = order.take(0, packs_per_shard * shards) // packs_per_shard
    stretches = 1 + np.count_nonzero(np.diff(walk))
    assert stretches > 3 * shards  # packs are mixed …
    for shard in range(shards):  # … and yet a shard is never needed again once its block is over
        at = np.flatnonzero(walk == shard)
        assert at[-1] - at[0] < block * packs_per_shard


def test_a_part_of_a_stream_is_passed_over_as_a_stream_of_its_own():
    order = stream_order([40, 30, 50], key="17/train/c4/1-256", block_shards=2, share=0.1)
    assert order.packs == 12
    first, second = order.take(0, 12), order.take(12, 24)
    assert len(set(first.tolist())) == 12
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert first.tolist() != second.tolist()
    assert np.concatenate([order.take(0, 5), order.take(5, 20)]).tolist() == order.take(0, 20).tolist()


def test_the_part_depends_on_the_seed_and_is_in_few_shards():
    shards = [10] * 100
    parts = [stream_order(shards, key=f"{seed}/train/c4/1-256", block_shards=4, share=0.0625) for seed in (17, 17, 18)]
    one, same, other = (sorted(part.take(0, part.packs).tolist()) for part in parts)
    assert one == same != other
    assert len(one) == 62  # of 1000
    assert len({pack // 10 for pack in one}) <= 8  # two blocks of four shards


def test_the_whole_and_the_smallest_part():
    whole, plain = (
        stream_order([3, 4], key="k", block_shards=2, share=1.0),
        StreamOrder([3, 4], key="k", block_shards=2),
    )
    assert whole.take(0, 14).tolist() == plain.take(0, 14).tolist()
    smallest = stream_order([3, 4], key="k", block_shards=2, share=0.001)
    assert smallest.packs == 1
    assert len(set(smallest.take(0, 5).tolist())) == 1
