"""How many elements attention moves between main memory (HBM) and on-chip memory (SRAM), counted tile by tile.

Idea:        On a GPU the naive way is limited by memory traffic, not by arithmetic: the scores travel to main memory
             and back between kernels. Tiling reads K and V once per tile of queries and moves no scores at all. Larger
             on-chip memory means larger tiles, so fewer passes over K and V.
Cost:        naive 4 t s + (2 t + 2 s) d elements; tiled about 2 s d a tile of queries, in all Theta(t s d^2 / M).
Paper:       Dao et al. 2022, arXiv:2205.14135, section 3.2, theorem 2 and proposition 3.
Production:  what a profiler reports as DRAM bytes of the fused kernel.
Leaves out:  the tile of scores itself, taken to live in registers; the backward pass, caches that serve some of the
             re-reads, dropout and masks.
"""


def naive_traffic(t: int, s: int, d: int) -> int:
    """Elements moved for one head when scores, softmax and weighted sum are three kernels."""
    scores = t * d + s * d + t * s  # read q and k, write the scores
    softmax = 2 * t * s  # read the scores, write the weights
    output = t * s + s * d + t * d  # read the weights and v, write the output
    return scores + softmax + output


def tile_sizes(d: int, sram: int) -> tuple[int, int]:
    """Queries and keys per tile for an on-chip memory of `sram` elements: four pieces of equal size, q, k, v, output.

    >>> tile_sizes(64, 96 * 1024 // 2)       # 96 KiB of float16
    (192, 192)
    """
    size = max(1, sram // (4 * d))
    return size, size


def tiled_traffic(t: int, s: int, d: int, sram: int) -> int:
    """Elements moved for one head by the tiled forward pass (queries outside, keys inside), counted loop by loop."""
    block_q, block_k = tile_sizes(d, sram)
    moved = 0
    for i in range(0, t, block_q):
        rows = min(block_q, t - i)
        moved += rows * d  # read a tile of q
        for j in range(0, s, block_k):
            moved += 2 * min(block_k, s - j) * d  # read a tile of k and of v
        moved += rows * d + rows  # write the output and the log-sum-exp
    return moved
