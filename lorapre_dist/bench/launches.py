"""Operations that one step starts on an accelerator, and times that the host waits for it: counted without one.

    python -m lorapre_dist.bench launches --model llama-60m --rank 128

The step runs on PyTorch's ``meta`` device, whose tensors have no numbers: it goes the way of an accelerator, with an
accelerator's blocks, and raises where a number would have to be read back. Every call of PyTorch's operator library
that is no view is counted. A GPU starts a kernel for each, some for several; what one takes at least is some
microseconds. Beside ours the optimizers that PyTorch has, and galore-torch where it is installed (on the CPU, as it
draws its projections at the first step).
"""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorapre_dist.optimizers import OPTIMIZERS

from .options import bench_parser
from .scaling import fake_world, row_shards
from .shapes import projections

VIEWS = {
    *("view", "slice", "select", "t", "transpose", "expand", "as_strided", "detach", "unsqueeze", "squeeze", "split"),
    *("unbind", "permute", "alias", "_unsafe_view", "diagonal", "split_with_sizes", "_reshape_alias", "lift_fresh"),
}
WAITS = ("_local_scalar_dense", "is_nonzero", "item", "nonzero")


class Launches(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        #: Times that the host would wait for a device.
        self.waits = 0
        #: Those that had tensors of several devices to work on, numbers apart.
        self.mixed: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.calls[name] += 1
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in WAITS and any(x.device.type != "cpu" for x in tensors):
            self.waits += 1
        if len({x.device.type for x in tensors if x.ndim or x.device.type != "cpu"}) > 1:
            self.mixed[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Operations that are no views."""
        return sum(self.calls.values())


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = bench_parser("launches", __doc__)
    parser.add_argument("--model", default="llama-60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--world_size", type=int, default=8, help="simulated ranks of the row shards")
    parser.add_argument("--operations", action="store_true", help="show the most frequent ones")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    count = len(projections(args.model))
    print(f"{args.model}, {count} matrices, rank {args.rank}, blocks as on an accelerator: operations of a step")
    print(f"  {'':<34} {'calls':>7} {'a matrix':>9} {'waits':>6}")
    for name, found in contenders(args.model, args.rank, args.world_size):
        print(f"  {name:<34} {found.total:>7,} {found.total / count:>9.1f} {found.waits:>6}")
        if args.operations:
            print("    " + ", ".join(f"{op} {n}" for op, n in found.calls.most_common(12)))


def contenders(model: str, rank: int, world_size: int) -> Any:
    """Name and count of each optimizer's step."""
    for kind in OPTIMIZERS:
        yield kind, count(functools.partial(ours, kind, model, rank))
    with fake_world(world_size, 0):
        yield f"LoRAPre, row shards, {world_size} ranks", count(lambda: ours("LoRAPre", model, rank, world_size))
    shapes = [shape for _, shape in projections(model)]
    yield "AdamW, foreach", count(lambda: torch.optim.AdamW(parameters(shapes), foreach=True))
    yield "Muon (torch)", count(lambda: torch.optim.Muon(parameters(shapes), lr=1e-3))
    if importlib.util.find_spec("galore_torch"):
        from galore_torch import GaLoreAdamW

        settings = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        yield (
            "GaLore, no SVD in the step",
            count(
                lambda: GaLoreAdamW([{"params": parameters(shapes, "cpu"), **settings}], no_deprecation_warning=True)
            ),
        )


def ours(kind: str, model: str, rank: int, size: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """One of our optimizers, of one rank's row shards, on a device without numbers."""
    return row_shards(kind, projections(model), rank, size, 0, torch.device("meta"), dtype, **options)


def parameters(shapes: list[tuple[int, int]], device: str = "meta") -> list[torch.nn.Parameter]:
    """Parameters of these shapes with gradients."""
    found = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for p in found:
        p.grad = torch.randn_like(p) * 1e-3
    return found


def count(build: Callable[[], Any]) -> Launches:
    """The operations of the second step of ``build()``."""
    optimizer = build()
    optimizer.step()
    with Launches() as found:
        optimizer.step()
    return found
