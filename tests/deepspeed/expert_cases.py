"""What runs on the ranks of the tests of DeepSpeed's experts: a real ``MoE``, and the same in fp64 on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import safe_get_full_fp32_param
from torch.nn import functional

import lorapre_dist
from lorapre_dist.integrations.deepspeed.names import naming
from lorapre_dist.optimizers import OPTIMIZERS
from tests import oracle

from .cases import ds_config, merge, params_of, worst

EXPERTS, HIDDEN, TOKENS = 4, 12, 24
PREFIX = "layers.0.moe.deepspeed_moe"


class Expert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(HIDDEN, 17), torch.nn.Linear(17, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.up_proj(x)))


class Block(torch.nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoE(HIDDEN, Expert(), EXPERTS, ep_size=ep_size, k=1, drop_tokens=False, use_rts=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.q_proj(x)
        return x + self.moe(x)[0]


class Net(torch.nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(ep_size)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x).square().mean()


def value(name: str, shape: Any) -> torch.Tensor:
    """What the parameter of this name begins with."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * (name.count(".3.") + 2 * name.count(".2.")))
    return torch.randn(shape, generator=generator, dtype=torch.float64) / 4


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(100 * step + rank))


def alike(step: int) -> torch.Tensor:
    return batch(step, 0)


def build(ep_size: int, stage: int, precision: str, clip: float, optimizer: str, changes: dict[str, Any]) -> Any:
    config = merge(ds_config(stage, precision, 1, clip, params_of(optimizer)), changes)
    config["optimizer"]["type"] = optimizer
    deepspeed.init_distributed(verbose=False)
    model = Net(ep_size)
    for _, module in model.named_modules():
        if hasattr(module, "set_deepspeed_parallelism"):  # so that names are known before the engine copies weights
            module.set_deepspeed_parallelism()
    named = naming(model)
    for name, p in model.named_parameters():
        p.data.copy_(value(named(name), p.shape))
    for module in model.modules():
        if hasattr(module, "ep_group"):
            module.ep_group = None  # the engine sets it
    return lorapre_dist.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def close(engine: Any) -> None:
    engine.destroy()
    dist.barrier()


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    """Those of all ranks, by name; what several have must be the same."""
    named, full = naming(engine.module), engine.optimizer is engine.basic_optimizer
    mine = {named(n): (p.detach() if full else safe_get_full_fp32_param(p)).clone() for n, p in _named(engine)}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(found.setdefault(name, tensor), tensor), f"{name} differs between ranks"
    return found


def _named(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return list(engine.module.named_parameters())


def dense(
    world_size: int, steps: int, clip: float, optimizer: str, params: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """The reference's parameters after ``steps`` on the batches of all ranks; each token goes to its best expert.

    Of no ranks: on the same batch everywhere, as :func:`visit_case` has it.
    """
    shapes = {"layers.0.q_proj.weight": (HIDDEN, HIDDEN), "layers.0.q_proj.bias": (HIDDEN,)}
    shapes[f"{PREFIX}.gate.wg.weight"] = (EXPERTS, HIDDEN)
    for e in range(EXPERTS):
        expert = f"{PREFIX}.experts.deepspeed_experts.{e}"
        shapes |= {f"{expert}.up_proj.weight": (17, HIDDEN), f"{expert}.up_proj.bias": (17,)}
        shapes[f"{expert}.down_proj.weight"] = (HIDDEN, 17)
    theta = {name: value(name, shape).float().double().requires_grad_() for name, shape in shapes.items()}
    config = OPTIMIZERS[optimizer].config_class(**params_of(optimizer) | (params or {}))
    plain = {name: p.data for name, p in theta.items()}
    state = oracle.init(plain, config, lambda n, p: "proj.weight" in n)

    def loss(x: torch.Tensor) -> torch.Tensor:
        x = x + functional.linear(x, theta["layers.0.q_proj.weight"], theta["layers.0.q_proj.bias"])
        gates = functional.linear(x, theta[f"{PREFIX}.gate.wg.weight"]).softmax(-1)
        best, out = gates.max(-1), torch.zeros_like(x)
        for e in range(EXPERTS):
            up, bias, down = (
                theta[f"{PREFIX}.experts.deepspeed_experts.{e}.{n}"]
                for n in ("up_proj.weight", "up_proj.bias", "down_proj.weight")
            )
            of_expert = functional.linear(functional.silu(functional.linear(x, up, bias)), down)
            out = out + of_expert * (best.values * (best.indices == e))[..., None]
        return (x + out).square().mean()

    for step in range(steps):
        each = [batch(step, rank) for rank in range(world_size)] or [alike(step)]
        total = sum(loss(one.double()) for one in each) / len(each)
        grads = torch.autograd.grad(total, list(theta.values()))
        factor = 1.0
        if clip:
            norm = torch.stack([g.norm() for g in grads]).norm()
            factor = min(1.0, float(clip / (norm + 1e-6)))
        oracle.step(plain, {n: g * factor for n, g in zip(theta, grads, strict=True)}, state, config)
    return plain


def equality_case(
    rank: int,
    world_size: int,
    *,
    ep_size: int,
    stage: int,
    clip: float,
    steps: int,
    optimizer: str = "LoRAPre",
    changes: Any = None,
) -> dict[str, Any]:
    """Train on batches of one's own and compare with the reference."""
    engine = build(ep_size, stage, "fp32", clip, optimizer, changes or {})
    try:
        for step in range(steps):
            engine.backward(engine(batch(step, rank)))
            engine.step()
        error, name = worst(parameters(engine), dense(world_size, steps, clip, optimizer))
        base = engine.basic_optimizer
        return {"error": error, "name": name, "layout": base.layout.name, "factors": sorted(base.factors())}
    finally:
        close(engine)


#: An expert's few tokens give a gradient of fewer directions than the rank. What its empty directions hold of rounding
#: comes with the weight of the residual: 1.5e-5 with the default of 0.9, and 5e-6 with this.
VISIT_PARAMS = {"residual": 0.3}


def visit_case(rank: int, world_size: int, *, ep_size: int, stage: int, folder: str, step: int) -> tuple[float, str]:
    """Go on from the checkpoint of ``step``, take one step, save; the distance to the reference."""
    engine = build(ep_size, stage, "fp32", 0.0, "LoRAPre", {"optimizer": {"params": VISIT_PARAMS}})
    try:
        if step:
            path, client = engine.load_checkpoint(folder)
            assert path is not None and client == {"step": step}, (path, client)
        engine.backward(engine(alike(step)))
        engine.step()
        engine.save_checkpoint(folder, client_state={"step": step + 1}, keep_last=2)
        return worst(parameters(engine), torch.load(Path(folder) / f"reference{step + 1}.pt"))
    finally:
        close(engine)
