"""The traffic model, by hand and against the theorem it stands for."""

import pytest

from minillm.attention.traffic import naive_traffic, tile_sizes, tiled_traffic


def test_naive_by_hand():
    # t=2, s=3, d=5: q 10, k 15, scores 6 | scores 6, weights 6 | weights 6, v 15, output 10
    assert naive_traffic(2, 3, 5) == (10 + 15 + 6) + (6 + 6) + (6 + 15 + 10)


def test_tiled_by_hand():
    # d=2, 16 elements on chip: tiles of 2. t=4: two tiles of queries, each reads 4 + k,v 2*6*2=24 and writes 4 + 2
    assert tile_sizes(2, 16) == (2, 2)
    assert tiled_traffic(4, 6, 2, 16) == 2 * (4 + 24 + 4 + 2)


def test_one_tile_reads_everything_once():
    assert tiled_traffic(8, 8, 4, 10**6) == 4 * 8 * 4 + 8


def test_ragged_tiles_count_every_row():
    # tiles of 2 over 5 queries: 3 passes over k and v
    assert tiled_traffic(5, 5, 2, 16) == 5 * 2 + 3 * 2 * 5 * 2 + 5 * 2 + 5


@pytest.mark.parametrize("d", [32, 64, 128])
def test_theorem_2_traffic_falls_as_one_over_sram(d):
    # leading term: t / block_q passes over 2 s d elements, block_q = M / 4d, so 8 t s d^2 / M. The lower-order terms
    # 2 t d + t are under 2 % of it at these sizes.
    t, sram = 16384, 64 * 4 * d
    assert tiled_traffic(t, t, d, sram) == pytest.approx(8 * t * t * d * d / sram, rel=0.02)
    assert tiled_traffic(t, t, d, sram) / tiled_traffic(t, t, d, 2 * sram) == pytest.approx(2, rel=0.02)


def test_tiny_sram_is_worse_than_naive():
    # the theorem needs d <= M: with almost no on-chip memory every query reads all of k and v again
    assert tiled_traffic(1024, 1024, 64, 64) > naive_traffic(1024, 1024, 64)
