"""The blocks of the paged KV cache: who holds them, which hold a known prefix, which go next.

A block holds `block_size` tokens' keys and values. One that is full can be shared by every request whose tokens up
to its end are the same; it is known by a hash chained over all blocks before it. A block that nobody holds stays
known until it is needed: the longest unused goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict


def prefix_root(alpha: float, salt: str = "") -> bytes:
    """The start of a hash chain: keys depend on dynamic NTK's alpha; a salt keeps tenants apart."""
    return hashlib.blake2b(f"{alpha}|{salt}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def block_hash(parent: bytes, tokens: list[int]) -> bytes:
    """The hash of a full block after `parent`: 128 bits of BLAKE2b, so that nobody can make two prefixes collide."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks, counted by reference. It never grows."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # in the order of use
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, known ones included."""
        return len(self._free)

    @property
    def num_known(self) -> int:
        """Blocks that the prefix cache can find."""
        return len(self._block_of)

    def find(self, hashes: list[bytes]) -> list[int]:
        """The blocks of the longest known beginning of `hashes`."""
        blocks = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_without(self, blocks: list[int]) -> int:
        """Free blocks left once `blocks` are held."""
        return len(self._free) - sum(self._references[block] == 0 for block in blocks)

    def is_shared(self, block: int) -> bool:
        """Whether a held block has another holder."""
        return self._references[block] > 1

    def hold(self, blocks: list[int]) -> None:
        """One more holder for known blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` free blocks, no longer known; the caller has seen that there are as many."""
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            key = self._hash_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: list[int]) -> None:
        """One holder fewer. The end of a sequence is given up before its beginning, unknown blocks before known."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, key: bytes) -> None:
        """Make a full, held block known. Where another block already holds the same prefix, that one stays known."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._hash_of[block] = key
