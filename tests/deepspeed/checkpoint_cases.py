"""What runs on the ranks of the checkpoint tests."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lorapre_dist
from lorapre_dist.checkpoint import CheckpointError
from lorapre_dist.checkpoint.files import weights_only
from lorapre_dist.config.param_groups import clean_name
from lorapre_dist.optimizers import OPTIMIZERS

from .cases import Net, build, dense_path, ds_config, factor_at, full_parameters, merge, params_of, slopes, worst


def scheduler(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor_at)


def engine_of(
    stage: int,
    precision: str,
    changes: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    optimizer: str = "LoRAPre",
) -> Any:
    config = merge(ds_config(stage, precision, 1, 0.5, {**params_of(optimizer), **(params or {})}), changes or {})
    config["optimizer"]["type"] = optimizer
    return build(config, lr_scheduler=scheduler)


def train_alike(engine: Any, steps: range, overflow_at: int = -1) -> None:
    """Steps whose gradients are the same on every rank, so that they do not depend on the world size."""
    for step in steps:
        batch = slopes(step, 0, 0, 1)
        if step == overflow_at:
            batch = {name: slope * 1e6 for name, slope in batch.items()}
        engine.backward(engine(batch))
        engine.step()


def snapshot(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of everything that training changes on this rank."""
    base = lorapre_dist.deepspeed.base_optimizer(engine)
    found = {f"{b.piece.name}.{k}": t.clone() for b in base.bound() for k, t in b.state.tensors().items()}
    found.update({f"{b.piece.name}.step": torch.tensor(b.state.step) for b in base.bound()})
    return found | full_parameters(engine)


def write_reference(folder: str, steps: int, optimizer: str = "LoRAPre") -> None:
    """The reference's parameters after each step, for :func:`visit_case`."""
    config = OPTIMIZERS[optimizer].config_class(**params_of(optimizer))
    for step, theta in enumerate(dense_path(config, steps, 1, 1, 0.5, set(), True)):
        torch.save(theta, Path(folder) / f"reference{step}.pt")


def visit_case(
    rank: int,
    world_size: int,
    *,
    stage: int,
    precision: str,
    folder: str,
    step: int,
    changes: Any = None,
    optimizer: str = "LoRAPre",
) -> tuple[float, str]:
    """Go on from the checkpoint of ``step``, take one step, save; the distance to the reference."""
    engine = engine_of(stage, precision, changes, optimizer=optimizer)
    try:
        if step:
            path, client = engine.load_checkpoint(folder)
            assert path is not None and client == {"step": step}, (path, client)
            assert engine.global_steps == step
        train_alike(engine, range(step, step + 1))
        engine.save_checkpoint(folder, client_state={"step": step + 1}, keep_last=2)
        return worst(full_parameters(engine), torch.load(Path(folder) / f"reference{step + 1}.pt"))
    finally:
        engine.destroy()
        dist.barrier()


def native_visit_case(
    rank: int, world_size: int, *, layout: str, folder: str, step: int, optimizer: str = "LoRAPre"
) -> tuple[float, str]:
    """As :func:`visit_case`, without DeepSpeed."""
    model: torch.nn.Module = Net()
    if layout == "fsdp2":
        model = fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    elif layout == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    stepper = OPTIMIZERS[optimizer](model.named_parameters(), **params_of(optimizer))
    schedule = scheduler(stepper)
    if step:
        client = lorapre_dist.checkpoint.load(model, stepper, folder, lr_scheduler=schedule)
        assert client == {"step": step}, client
    model(slopes(step, 0, 0, 1)).backward()
    for p in model.parameters():
        if p.requires_grad and p.grad is None:  # as DeepSpeed, and the reference here
            p.grad = torch.zeros_like(p)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
    stepper.step()
    schedule.step()
    state = {"extra": {"step": step + 1}, "lr_scheduler": schedule, "keep_last": 2}
    lorapre_dist.checkpoint.save(model, stepper, folder, f"global_step{step + 1}", **state)
    got = {
        clean_name(n): (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    return worst(got, torch.load(Path(folder) / f"reference{step + 1}.pt"))


def resume_case(
    rank: int,
    world_size: int,
    *,
    stage: int,
    precision: str,
    folder: str,
    changes: dict[str, Any] | None = None,
    background: bool = False,
) -> dict[str, float]:
    """Ten steps, a checkpoint, a fresh engine that loads it, four more: the distance to 14 steps without a break."""
    overflow_at = 6 if precision == "fp16" else -1
    engine = engine_of(stage, precision, changes)
    train_alike(engine, range(10), overflow_at)
    engine.save_checkpoint(folder, client_state={"note": "kept"}, background=background)
    train_alike(engine, range(10, 14))  # also shows that a background save sees the state as it was
    whole, counters = snapshot(engine), (engine.global_steps, engine.skipped_steps, engine.get_lr())
    scale = engine.optimizer.loss_scale if precision == "fp16" else 1
    engine.destroy()
    dist.barrier()
    engine = engine_of(stage, precision, changes)
    path, client = engine.load_checkpoint(folder)
    assert path is not None and client == {"note": "kept"}, path
    train_alike(engine, range(10, 14))
    resumed = snapshot(engine)
    assert counters == (engine.global_steps, engine.skipped_steps, engine.get_lr())
    assert scale == (engine.optimizer.loss_scale if precision == "fp16" else 1)
    engine.destroy()
    dist.barrier()
    return {n: float((resumed[n] - value).abs().max()) for n, value in whole.items() if value.numel()}


def save_case(rank: int, world_size: int, *, stage: int, folder: str, steps: int = 3) -> None:
    """Train a little and save."""
    engine = engine_of(stage, "fp32")
    train_alike(engine, range(steps))
    engine.save_checkpoint(folder, tag="three")
    engine.destroy()
    dist.barrier()


def load_case(
    rank: int,
    world_size: int,
    *,
    stage: int,
    folder: str,
    tag: str | None = None,
    options: Any = None,
    params: Any = None,
) -> str:
    """Load what may not fit or be damaged: the error's text, and whether anything was changed."""
    engine = engine_of(stage, "fp32", params=params)
    before = snapshot(engine)
    try:
        path, _ = engine.load_checkpoint(folder, tag, **(options or {}))
        return f"loaded {Path(path).name if path else None}"
    except (CheckpointError, lorapre_dist.ConfigError) as error:
        after = snapshot(engine)
        return f"{error} unchanged={all(torch.equal(before[n], after[n]) for n in before)}"
    finally:
        engine.destroy()
        dist.barrier()


def private_disk_case(rank: int, world_size: int, *, folder: str) -> str:
    """Save to a folder that is another one on each rank, as on machines without shared storage."""
    engine = engine_of(2, "fp32")
    try:
        engine.save_checkpoint(str(Path(folder) / f"rank{rank}"), tag="one")
        return "saved"
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
        dist.barrier()


def full_disk_case(rank: int, world_size: int, *, stage: int, folder: str, background: bool) -> tuple[str, bool, str]:
    """One rank cannot write: what is raised, whether training went on as if nothing had been, and what is left."""
    engine, twin = engine_of(stage, "fp32"), engine_of(stage, "fp32")
    for e in (engine, twin):
        train_alike(e, range(2))
    # The first background save makes a process group, which writes to the store that the ranks met in.
    engine.save_checkpoint(folder, tag="good", background=background)
    lorapre_dist.checkpoint.wait(engine)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    text = "saved"
    try:
        engine.save_checkpoint(folder, tag="bad", background=background)
        lorapre_dist.checkpoint.wait(engine)
    except CheckpointError as error:
        text = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for e in (engine, twin):
        train_alike(e, range(2, 4))
    ours, want = snapshot(engine), snapshot(twin)
    same = all(torch.equal(ours[n], want[n]) for n in want)
    left = sorted(p.name for p in Path(folder).iterdir())
    engine.save_checkpoint(folder, tag="after")
    for e in (engine, twin):
        e.destroy()
    dist.barrier()
    return text, same, " ".join(left)


def resized_case(
    rank: int, world_size: int, *, stage: int, folder: str, params: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Load with ``resize_rank`` into other ranks, train on; every matrix's product ``B A`` as it was loaded."""
    engine = engine_of(stage, "fp32", params=params)
    engine.load_checkpoint(folder, resize_rank=True)
    whole = lorapre_dist.deepspeed.base_optimizer(engine).full_state_dict()
    train_alike(engine, range(3, 6))
    assert all(t.isfinite().all() for t in snapshot(engine).values())
    assert lorapre_dist.deepspeed.base_optimizer(engine).param_groups[0]["rank"] == params["rank"]
    engine.destroy()
    dist.barrier()
    return {f"{n}.{m}": s[f"{m}_B"] @ s[f"{m}_A"] for n, s in whole.items() if "m_B" in s for m in "mv"}


def gathered_case(rank: int, world_size: int, *, stage: int, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``full_state_dict`` after three steps, and again after it was loaded into a fresh engine."""
    engine = engine_of(stage, "fp32")
    train_alike(engine, range(3))
    base = lorapre_dist.deepspeed.base_optimizer(engine)
    first = base.full_state_dict()
    engine.destroy()
    dist.barrier()
    engine = engine_of(stage, "fp32")
    base = lorapre_dist.deepspeed.base_optimizer(engine)
    base.load_full_state_dict(first)
    second = base.full_state_dict()
    engine.destroy()
    dist.barrier()
    return first, second


def poisoned(file: Path, mark: Path) -> bytes:
    """Replace a file of DeepSpeed's by one that would make the folder ``mark``; what it was."""
    content = file.read_bytes()
    torch.save(Harm(mark), file)
    return content


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def others_files_case(rank: int, world_size: int, *, stage: int, precision: str, folder: str) -> list[str]:
    """Checkpoints of an AdamW run: resumed, refused where they hold code, and as weights for LoRAPre likewise."""
    config = ds_config(stage, precision, 1, 0.5, {})
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    said, own, mark = [], f"_pp_rank_{rank}_", Path(folder) / f"harmed{rank}"
    for load in ("resume", "weights"):
        engine = build(config, lr_scheduler=scheduler)
        tag = Path(folder) / "tag"
        if load == "resume":
            train_alike(engine, range(1))
            engine.save_checkpoint(folder, tag="tag", client_state={"note": [1]})
            dist.barrier()
            files = sorted(p for p in tag.glob("*.pt") if "_pp_" not in p.name or own in p.name)
        else:
            engine.destroy()
            engine = engine_of(stage, precision)
            files = [p for p in files if "model_states" in p.name]
        dist.barrier()
        for file in [None, *files]:
            kept = poisoned(file, mark) if file is not None and (rank == 0 or own in file.name) else b""
            dist.barrier()
            try:
                if load == "resume":
                    with weights_only(tag):
                        _, client = engine.load_checkpoint(folder, tag="tag")
                    said.append(f"loaded {client['note']}")
                else:
                    engine.load_checkpoint(folder, tag="tag", load_module_only=True)
                    said.append("loaded")
            except CheckpointError as error:
                said.append(str(error))
            dist.barrier()
            if kept and file is not None:
                file.write_bytes(kept)
            dist.barrier()
        assert not mark.exists()
        engine.destroy()
        dist.barrier()
    return said
