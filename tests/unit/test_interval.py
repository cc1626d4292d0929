"""Integer geometry of row-major intervals: any tiling of any matrix, each element and each row accounted for once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lorapre_dist.core.interval import RowInterval, column_block, cut_rows
from lorapre_dist.layouts.base import Piece
from lorapre_dist.layouts.geometry.ranges import equal_ranges, overlap
from lorapre_dist.layouts.tensor_parallel import Split, of_whole

shapes = st.tuples(st.integers(1, 9), st.integers(1, 12))


@st.composite
def intervals(draw):
    p, q = draw(shapes)
    start = draw(st.integers(0, p * q))
    return RowInterval("w", (p, q), start, draw(st.integers(start, p * q)))


@st.composite
def tilings(draw):
    """A shape and consecutive ranges that tile it; some are empty, some inside one row."""
    p, q = draw(shapes)
    edges = sorted(draw(st.lists(st.integers(0, p * q), max_size=5)))
    edges = [0, *edges, p * q]
    return (p, q), tuple(itertools.pairwise(edges))


def held(interval: RowInterval) -> np.ndarray:
    """p x q, True where the interval holds the element: the definition."""
    mask = np.zeros(interval.shape, dtype=bool)
    mask.reshape(-1)[interval.start : interval.stop] = True
    return mask


# segments -------------------------------------------------------------------------------------------------------


@given(intervals())
@example(RowInterval("inside one row", (3, 5), 6, 8))
@example(RowInterval("part, whole, part", (4, 5), 3, 17))
@example(RowInterval("two parts, no whole row", (3, 5), 3, 7))
@example(RowInterval("empty in the middle", (3, 5), 7, 7))
@example(RowInterval("everything", (3, 5), 0, 15))
def test_segments_tile_the_interval_in_order(interval):
    p, q = interval.shape
    index = np.arange(p * q).reshape(p, q)
    covered = []
    for segment in interval.segments:
        block = index[segment.row : segment.row + segment.rows, segment.col : segment.col_stop]
        assert segment.numel == block.size > 0
        # At ``offset`` in the interval the rectangle's elements follow each other, row by row.
        assert segment.offset == len(covered)
        covered += block.reshape(-1).tolist()
    assert covered == list(range(interval.start, interval.stop))


@given(intervals())
def test_segments_are_at_most_three_and_whole_rows_or_part_of_one(interval):
    segments = interval.segments
    q = interval.shape[1]
    assert len(segments) <= 3
    for segment in segments:
        whole = (segment.col, segment.col_stop) == (0, q)
        assert whole or segment.rows == 1
    assert sum((s.col, s.col_stop) == (0, q) for s in segments) <= 1


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 16), (16, 16)])
def test_an_interval_outside_the_matrix_is_refused(start, stop):
    with pytest.raises(ValueError, match=rf"w: interval \[{start}, {stop}\) is outside a 3 x 5 matrix"):
        RowInterval("w", (3, 5), start, stop)


# rows -----------------------------------------------------------------------------------------------------------


@given(intervals())
def test_rows_are_those_that_hold_an_element(interval):
    touched = np.flatnonzero(held(interval).any(1))
    assert interval.numel == held(interval).sum()
    assert interval.rows == len(touched)
    assert interval.first_row == (touched[0] if len(touched) else 0)


@given(intervals())
def test_first_owned_is_the_first_row_whose_first_element_is_held(interval):
    starts = held(interval)[:, 0]
    touched = range(interval.first_row, interval.first_row + interval.rows)
    assert [bool(starts[row]) for row in touched] == [k >= interval.first_owned for k in range(interval.rows)]


@given(tilings())
def test_every_row_is_counted_once_over_a_tiling(tiling):
    (p, q), ranges = tiling
    counted = np.zeros(p, dtype=int)
    for start, stop in ranges:
        interval = RowInterval("w", (p, q), start, stop)
        first = interval.first_row
        counted[first + interval.first_owned : first + interval.rows] += 1
    assert counted.tolist() == [1] * p


@given(tilings())
def test_cut_rows_are_those_that_several_ranges_touch(tiling):
    (p, q), ranges = tiling
    touching = sum(held(RowInterval("w", (p, q), *r)).any(1).astype(int) for r in ranges)
    assert cut_rows(ranges, q) == tuple(np.flatnonzero(touching > 1).tolist())


def test_a_row_over_three_ranges_is_one_cut_row():
    assert cut_rows(((0, 7), (7, 7), (7, 8), (8, 20)), 5) == (1,)


@given(tilings())
def test_only_the_outer_segments_lie_in_cut_rows(tiling):
    """What the step relies on: a segment is whole rows, none of them cut, or a part of one cut row."""
    (p, q), ranges = tiling
    cut = cut_rows(ranges, q)
    for start, stop in ranges:
        for segment in RowInterval("w", (p, q), start, stop).segments:
            partial = segment.col_stop - segment.col < q
            rows = range(segment.row, segment.row + segment.rows)
            assert [row in cut for row in rows] == [partial] * segment.rows


# column_block, equal_ranges, overlap ----------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 9))
def test_column_blocks_tile_the_columns_in_blocks_of_one_size(q, parts):
    blocks = [column_block(q, parts, index) for index in range(parts)]
    assert [c for low, high in blocks for c in range(low, high)] == list(range(q))
    size = -(-q // parts)
    assert all(high - low <= size for low, high in blocks)
    # Padded to ``size``, block k begins at k * size: gathered blocks lie end to end, the padding last.
    assert all(low == index * size for index, (low, high) in enumerate(blocks) if low < high)


@given(st.integers(0, 500), st.integers(1, 9))
def test_equal_ranges_tile(numel, parts):
    ranges = equal_ranges(numel, parts)
    assert len(ranges) == parts
    assert [i for low, high in ranges for i in range(low, high)] == list(range(numel))
    sizes = [high - low for low, high in ranges]
    assert sizes == sorted(sizes, reverse=True)
    # No larger than it has to be.
    assert sizes[0] == -(-numel // parts)


@given(*[st.integers(0, 40)] * 4)
def test_overlap_is_the_intersection_measured_from_the_start(a, b, c, d):
    (start, stop), (low, high) = sorted((a, b)), sorted((c, d))
    first, last = overlap(start, stop, low, high)
    assert 0 <= first <= last <= stop - start
    assert list(range(start + first, start + last)) == sorted(set(range(start, stop)) & set(range(low, high)))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 5))
def test_overlaps_with_equal_parts_tile_every_parameter(numels, world):
    """How a flat buffer is cut: each parameter's pieces, over ranks, tile it in order."""
    part = -(-sum(numels) // world)
    offset = 0
    for numel in numels:
        pieces = [overlap(offset, offset + numel, k * part, (k + 1) * part) for k in range(world)]
        assert [i for low, high in pieces for i in range(low, high)] == list(range(numel))
        offset += numel


# columns, cut again ---------------------------------------------------------------------------------------------


@st.composite
def parts_of_columns(draw):
    """Pieces that tile a matrix which is split by columns, each part of which is cut as if it were the matrix."""
    p, q = draw(shapes)
    middle, found = draw(st.integers(0, q)), []
    for first, last in ((0, middle), (middle, q)):
        whole = Split((p, q), 1, first, last)
        edges = [0, *sorted(draw(st.lists(st.integers(0, p * (last - first)), max_size=3))), p * (last - first)]
        pairs = itertools.pairwise(edges) if first < last else []
        found += [of_whole(Piece("w", (p, last - first), a, b, 0), whole) for a, b in pairs]
    return [RowInterval("w", (p, q), piece.start, piece.stop, piece.columns) for piece in found]


@given(parts_of_columns())
def test_parts_of_columns_hold_every_element_and_count_every_row_once(pieces):
    p, q = pieces[0].shape
    seen, owned = np.zeros((p, q), dtype=int), np.zeros(p, dtype=int)
    for piece in pieces:
        at = 0
        for segment in piece.segments:
            assert segment.offset == at and segment.numel > 0
            at += segment.numel
            for row, col in itertools.product(range(segment.row, segment.row + segment.rows), range(q)):
                inside = segment.col <= col < segment.col_stop
                place = segment.offset + (row - segment.row) * (segment.col_stop - segment.col) + col - segment.col
                assert not inside or piece.place(row, col) == place
                seen[row, col] += inside
        assert at == piece.numel
        owned[piece.first_row + piece.first_owned : piece.first_row + piece.rows] += 1
    assert (seen == 1).all() and (owned == 1).all()
