"""Geometry from shapes alone: every element has one owner, in any layout of any shapes; no torch in it."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter

import pytest
from deepspeed.runtime.utils import partition_balanced
from hypothesis import given
from hypothesis import strategies as st

from lorapre_dist.core.spec import Axis, axis_of, of_matrix, of_vector
from lorapre_dist.layouts.geometry import axes, dealt, flat, per_parameter, rows
from lorapre_dist.layouts.geometry.shares import Arrangement, replicated

shape = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(2, 5)),
)
models = st.lists(shape, min_size=1, max_size=6).map(
    lambda shapes: [(f"layers.{k}.{name_of(k)}.weight", s) for k, s in enumerate(shapes)]
)
ranks = st.integers(1, 7)


def name_of(k: int) -> str:
    return ("q_proj", "o_proj", "up_proj", "down_proj")[k % 4]


def low_rank(name: str, sides: tuple[int, ...]) -> bool:
    return len(sides) > 1 and min(sides[-2:]) > 2


def arrangements(named, n) -> dict[str, Arrangement]:
    return {
        "zero12": flat.zero12(named, n),
        "zero12, aligned, in turns": flat.zero12(named, n, align=4, round_robin=True),
        "fsdp1": flat.fsdp1([named[::2], named[1::2]], named, n),
        "zero3": per_parameter.zero3(named, n, 20),
        "fsdp2": rows.fsdp2(named, n),
        "tensor parallel": rows.tensor_parallel(named, n),
        "ddp": dealt.ddp(named, n, low_rank),
        "replicated": replicated(named),
    }


@given(models, ranks)
def test_every_element_lies_on_one_rank_or_on_all(named, n):
    for layout, arrangement in arrangements(named, n).items():
        for stage in (arrangement, arrangement.matrices(low_rank)):
            found: Counter[str] = Counter()
            for share in stage.shares:
                name = share.name.partition("[")[0]
                if share.columns is None:
                    found[name] += sum(stop - start for start, stop in share.ranges)
                    bounds = [x for x in share.ranges if x[0] < x[1]]
                    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds)), layout
                else:
                    found[name] += share.shape[0] * sum(last - first for first, last in share.columns)
                assert len(share.ranges) in (1, len(share.ranks)) and max(share.ranks) < stage.size
            assert found == {name: math.prod(sides) for name, sides in named}, layout


@given(models, ranks)
def test_matrices_are_numbered_in_order(named, n):
    """Shared ones by what is ahead of them, unless each rank would count from its own first one."""
    for layout, arrangement in arrangements(named, n).items():
        before = [share.before for share in arrangement.matrices(low_rank).shares]
        assert before == sorted(before)
        assert any(any(x) for x in before) == (not layout.startswith("zero12") and len(before) > 1)


@given(models, ranks, st.integers(1, 3))
def test_what_is_split_and_cut_again_lies_on_one_rank_and_all_else_in_every_part(named, n, parts):
    inner = {
        "zero12": lambda some: flat.zero12(some, n),
        "zero3": lambda some: per_parameter.zero3(some, n, 20),
        "fsdp2": lambda some: rows.fsdp2(some, n),
        "replicated": replicated,
    }
    for layout, spread in inner.items():
        found = axes.cut_again(named, parts, rows.split_dim, spread).matrices(low_rank)
        assert found.size == parts * (1 if layout == "replicated" else n)
        held: Counter[str] = Counter()
        for share in found.shares:
            assert list(share.ranks) == sorted(share.ranks) and max(share.ranks, default=0) < found.size
            each = share.numels.sum() if share.shared else len(share.ranks) * share.numel
            held[share.name.partition("[")[0]] += int(each)
        for name, sides in named:
            copies = 1 if rows.split_dim(name, sides) is not None else parts
            assert held[name] == copies * math.prod(sides), (layout, name)


@given(st.lists(st.sampled_from([1, 5, 5, 5, 40]), min_size=1, max_size=12), st.integers(1, 6))
def test_layers_are_dealt_out_as_deepspeed_does(weights, parts):
    assert axes.balanced(weights, parts) == [int(at) for at in partition_balanced(weights, parts)]


def test_stages_by_hand():
    block = {"q_proj.weight": (4, 4), "norm.weight": (4,)}
    named = [("embed.weight", (4, 4)), *((f"layers.{k}.{n}", s) for k in range(4) for n, s in block.items())]
    named += [("norm.weight", (4,)), ("head.weight", (4, 4))]
    first, second = axes.stages(named, 2)
    assert [*first, *second] == [name for name, _ in named]
    assert first[-1] == "layers.1.norm.weight"
    with pytest.raises(ValueError, match="7 layers are fewer than 8 stages"):
        axes.stages(named, 8)


@given(models, ranks)
def test_matrices_are_dealt_out_whole_and_evenly(named, n):
    arrangement = dealt.ddp(named, n, low_rank).matrices(low_rank)
    if n > 1:
        assert sum(arrangement.steps) == sum(math.prod(sides) for _, sides in named)
    load = [0] * n
    for share in arrangement.shares:
        if low_rank(share.name, share.shape):
            assert not share.shared
            load[share.ranks[0]] += share.numel
    largest = max((s.numel for s in arrangement.shares), default=0)
    assert max(load) - min(load) <= largest or n == 1


def test_an_aligned_buffer_by_hand():
    buffer = flat.Buffer.of([5, 3, 6], 2, align=4, pad=2)
    assert buffer == flat.Buffer((0, 8, 12), 10)  # 18 elements in two parts, each a multiple of 2


def test_tensor_parallel_by_hand():
    named = [("layers.0.q_proj.weight", (4, 6)), ("layers.0.q_proj.bias", (4,)), ("layers.0.o_proj.weight", (4, 6))]
    named += [("layers.0.o_proj.bias", (4,)), ("layers.0.norm.weight", (6,)), ("lm_head.weight", (8, 6))]
    q, bias, o, *rest = rows.tensor_parallel(named, 2).shares
    assert (q.ranges, q.columns) == (((0, 12), (12, 24)), None)
    assert bias.ranges == ((0, 2), (2, 4))
    assert (o.ranges, o.columns) == (((0, 24), (0, 24)), ((0, 3), (3, 6)))
    assert not any(share.shared for share in rest)


def test_state_is_stated_by_axis_rank_and_type():
    spec = of_matrix({"m": 3, "v": 2}, ("rms_row", "rms_col"), "bfloat16")
    assert {key: one.shape(5) for key, one in spec.items()} == {
        **{"m_B": (5, 3), "m_A": (3, 5), "v_B": (5, 2), "v_A": (2, 5)},
        **{"rms_row": (5,), "rms_col": (5,)},
    }
    assert spec["m_A"].bytes(5) == 2 * 15 and of_vector()["exp_avg"].bytes(5) == 20
    assert [axis_of(key) for key in ("m_B", "v_A", "rms_row", "rms_col", "exp_avg_sq")] == [
        Axis.ROWS,
        Axis.COLUMNS,
        Axis.ROWS,
        Axis.ALL_COLUMNS,
        Axis.ELEMENTS,
    ]


@pytest.mark.parametrize("module", ["layouts.geometry.dealt", "layouts.geometry.flat", "core.arithmetic", "planner"])
def test_there_is_no_torch_in_it(module):
    code = f"import sys; import lorapre_dist.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
