"""The cache's blocks: sharing, and which is given up first."""

from __future__ import annotations

import pytest

from qwenfit.engine.block_pool import BlockPool, block_hash, prefix_root

ROOT = prefix_root(1.0)


def chain(*blocks: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    for tokens in blocks:
        keys.append(block_hash(keys[-1] if keys else ROOT, tokens))
    return keys


def test_a_hash_knows_everything_before_it():
    assert chain([1, 2], [3, 4])[1] != chain([1, 9], [3, 4])[1]
    assert len({prefix_root(1.0), prefix_root(3.0), prefix_root(1.0, "a"), prefix_root(3.0, "a")}) == 4
    assert block_hash(ROOT, [1, 2]) != block_hash(ROOT, [2, 1])


def test_a_released_block_is_found_until_it_is_taken():
    pool = BlockPool(3, 2)
    keys = chain([1, 2], [3, 4])
    blocks = pool.take(2)
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    assert pool.num_free == 3 and pool.find(keys) == blocks
    (unknown,) = pool.take(1)
    assert unknown not in blocks  # a block that nothing is known of goes first
    pool.take(1)
    assert pool.find(keys) == blocks[:1]  # then the end of the prefix, so that its beginning stays useful
    pool.take(1)
    assert pool.find(keys) == [] and pool.num_known == 0


def test_the_longest_unused_goes_first():
    pool = BlockPool(2, 2)
    (a,), (b,) = chain([1, 1]), chain([2, 2])
    for key in (a, b):
        (block,) = pool.take(1)
        pool.publish(block, key)
        pool.release([block])
    found = pool.find([a])
    pool.hold(found)
    pool.release(found)  # a is now the one used last
    pool.take(1)
    assert pool.find([b]) == [] and pool.find([a]) == found


def test_a_shared_block_is_free_when_the_last_holder_lets_go():
    pool = BlockPool(2, 2)
    blocks = pool.take(1)
    pool.publish(blocks[0], ROOT)
    pool.hold(blocks)
    pool.release(blocks)
    assert pool.num_free == 1 and pool.num_free_without(blocks) == 1
    pool.release(blocks)
    assert pool.num_free == 2 and pool.num_free_without(blocks) == 1


def test_of_two_equal_blocks_the_first_stays_known():
    pool = BlockPool(2, 2)
    first, second = pool.take(2)
    pool.publish(first, ROOT)
    pool.publish(second, ROOT)
    assert pool.find([ROOT]) == [first] and pool.num_known == 1
    pool.release([second])
    pool.release([first])
    assert pool.take(1) == [second]


def test_more_than_there_is_cannot_be_taken():
    with pytest.raises(KeyError):
        BlockPool(1, 2).take(2)
