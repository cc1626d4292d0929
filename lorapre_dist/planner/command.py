"""``lorapre plan``: from options and a DeepSpeed JSON to a request, and what to print."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lorapre_dist.config import CONFIGS, VARIANTS, ConfigError
from lorapre_dist.config.options import EMBEDDINGS, OTHER_STATES, STATE_DTYPES, WEIGHTS, WORKS
from lorapre_dist.training.engines.presets import RECIPES, recipe

from .fitting import mildest
from .models import NAMES, find
from .plan import plan, smallest_world
from .render import as_json, chart, table
from .request import BYTES, LAYOUTS, OFFLOADING, Request, Zero
from .seconds import DEVICES, rate, rates_of

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SMALLEST_MEMORY = 2**20
# Settings of optimizers that have options of their own here.
SETTINGS = (
    *("rank", "rank_v", "variant", "target_modules"),
    *("weights", "release_gradients", "state_dtype", "other_state", "embeddings", "work"),
)
RATES = {
    "flops": "flops of matrix products a second (300e12, 300T)",
    "bandwidth": "bytes of device memory a second",
    "network": "bytes that a rank sends a second",
    "launch": "seconds that starting an operation takes",
    "solve": "flops of r x r factorisations a second",
    "latency": "seconds of a collective beside its bytes",
}


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add(
        "--recipe", choices=RECIPES, help="plan for a recipe of lorapre pretrain: its model, JSON, layout and sequences"
    )
    add(
        "--model",
        help="a preset (llama-60m ... llama-7b, llama-70b), or a model folder, config.json or hub name of HF's",
    )
    add("--layout", choices=LAYOUTS, help="where parameters lie (default: zero2)")
    add("--stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage: another name of --layout zero0 to zero3")
    add("--world_size", type=int, default=1, help="ranks (default: 1)")
    add("--shard_size", type=int, default=8, help="under hsdp, ranks that share the parameters (default: 8)")
    add("--pipeline", type=int, help="stages that the layers are dealt out to (zero0, zero1, fsdp2; default: 1)")
    add("--tensor", type=int, help="ranks that each matrix is split over (zero0 to zero3, fsdp2; default: 1)")
    add("--expert", type=int, help="ranks that the experts of each layer are split over (fsdp2; default: 1)")
    add("--replicated_state", action="store_true", help="under ddp, keep all of the state on every rank")
    add("--optimizer", choices=(*CONFIGS, "all"), help="one of ours, or all five of them (default: LoRAPre)")
    add("--rank", type=int, help="of the first moment's factors, also GaLore's (default: 128)")
    add(
        "--rank_v", type=int, help="of the second moment's factors, where there are some (default: as in the optimizer)"
    )
    add("--variant", choices=VARIANTS, help="of our optimizers (default: stable)")
    add("--target_modules", nargs="+", metavar="NAME", help="low-rank modules: names or regular expressions")
    add("--weights", choices=[w for w in WEIGHTS if w], help="how bf16 weights without an fp32 copy are stepped")
    add("--state_dtype", choices=STATE_DTYPES, help="form of the factors between steps (default: fp32)")
    add("--other_state", choices=OTHER_STATES, help="state of 2-D parameters that are no projections (default: adamw)")
    add("--embeddings", choices=EMBEDDINGS, help="low_rank: embedding and head, too (default: full)")
    add("--work", choices=WORKS, help="how ranks that share matrices divide a step (default: rows)")
    add("--release_gradients", action="store_true", default=None, help="step in the backward pass (ddp, fsdp2, tp)")
    add("--micro_batch", type=int, help="sequences of a forward pass (default: the JSON's, or 1)")
    add("--seq_len", type=int, help="tokens of a sequence; without it activations are not planned for")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in backward")
    add("--precision", choices=tuple(BYTES), help="of computation (default: bf16, with fp32 master weights)")
    add("--offload", action="store_true", help="optimizer state and master weights in host memory")
    add("--accumulation", type=int, help="micro-batches per step (default: 1)")
    add("--deepspeed_config", metavar="JSON", help="take all of that from this file; options given here come first")
    add(
        "--max_memory",
        metavar="SIZE",
        help="also say which options, the mildest first, make it fit, and from how many ranks each layout does; 80GiB",
    )
    add("--device", choices=tuple(DEVICES), help="predict seconds of a step from rates assumed of this device")
    for name, what in RATES.items():
        add(f"--{name}", type=rate, metavar="RATE", help=f"{what}, instead of the device's")
    add("--json", action="store_true", help="print JSON, all sizes in bytes")
    add("--plot", type=Path, metavar="FILE", help="draw memory per rank against world size and against rank (.png)")


def run(given: argparse.Namespace) -> int:
    """Print the plan."""
    limit = size_of(given.max_memory) if given.max_memory else None
    _of_recipe(given)
    rates = rates_of(given.device, {k: v for k in RATES if (v := getattr(given, k)) is not None})
    requests = requests_of(given)
    request = requests[0]
    usages = plan(request)
    ours = {r.optimizer.optimizer: plan(r, (r.optimizer.optimizer,)) for r in requests[1:]}
    first = request.optimizer.optimizer
    usages = {first: usages.pop(first)} | {name: found[name] for name, found in ours.items()} | usages
    fits = {} if limit is None else _fits(request, limit)
    options = None if limit is None else mildest(request, limit)
    if given.json:
        print(json.dumps(as_json(request, usages, fits, limit, rates, options), indent=1))
    else:
        print(table(request, usages, fits, limit, rates, options))
    if given.plot:
        chart(request, given.plot)
        if not given.json:
            print(f"\nchart: {given.plot}")
    return 0


def _of_recipe(given: argparse.Namespace) -> None:
    """Fill in what a recipe says and the options do not."""
    if given.recipe is None:
        if given.model is None:
            raise ConfigError("--model is needed: a preset, a model folder, config.json or hub name; or --recipe")
        return
    said = recipe(given.recipe)
    given.model = given.model or said["model"]
    given.deepspeed_config = given.deepspeed_config or said["deepspeed_config"]
    given.seq_len = given.seq_len or said["seq_len"]
    given.gradient_checkpointing = given.gradient_checkpointing or said.get("gradient_checkpointing", False)
    if given.layout is None and given.stage is None and said.get("backend", "deepspeed") != "deepspeed":
        given.layout = said["backend"]


def requests_of(given: argparse.Namespace) -> list[Request]:
    """What the options and the JSON that they name ask for: of each optimizer that is planned for.

    Raises:
        ConfigError: a bad or contradictory option, an unreadable file.
    """
    layout = given.layout
    if given.stage is not None:
        if layout not in (None, f"zero{given.stage}"):
            raise ConfigError(f"--stage {given.stage} and --layout {layout}: give one of them")
        layout = f"zero{given.stage}"
    values: dict[str, Any] = {"world_size": given.world_size, "offload": given.offload}
    kind, ours = "LoRAPre", dict[str, Any]()
    if given.deepspeed_config:
        found, kind, ours = _from_json(given.deepspeed_config, given, layout)
        values |= found | {"offload": found["offload"] or given.offload}
    values |= {
        k: v
        for k in ("precision", "accumulation", "micro_batch", "seq_len", "pipeline", "tensor", "expert")
        if (v := getattr(given, k, None)) is not None
    }
    values |= {"layout": layout} if layout else {}
    values |= {"shard_size": given.shard_size, "shard_state": not given.replicated_state}
    values["checkpointing"] = given.gradient_checkpointing or values.get("checkpointing", False)
    chosen = given.optimizer or kind
    options = {k: v for k in SETTINGS if (v := getattr(given, k, None)) is not None}
    name = Path(given.model).name or given.model
    name = name if name != "config.json" else Path(given.model).resolve().parent.name
    what, parameters = find(given.model)
    name = name if given.model in NAMES else f"{name} ({what})"
    requests = []
    for one in CONFIGS if chosen == "all" else (chosen,):
        known = {f.name for f in fields(CONFIGS[one])}
        own = ours if one == kind else {k: v for k, v in ours.items() if k in SETTINGS and k in known}
        if chosen != "all" and options.keys() - known:
            raise ConfigError(f"--{min(options.keys() - known)}: {one} has none")
        config = CONFIGS[one].from_params(own | {k: v for k, v in options.items() if k in known})
        requests.append(Request(name, parameters, optimizer=config, **values))
    return requests


def _from_json(path: str, given: argparse.Namespace, layout: str | None) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Settings of the request; the name of our optimizer (LoRAPre for another one), and its settings."""
    # It imports DeepSpeed.
    from lorapre_dist.config import ds_training
    from lorapre_dist.integrations.deepspeed.bind import check_config

    config = ds_training.read_deepspeed_config(path)
    check_config(config)
    kind, section = config["optimizer"]["type"], config.get("zero_optimization") or {}
    section = {} if section is True else section  # DeepSpeed's old switch
    if (section.get("offload_param") or {}).get("device", "none") != "none":
        raise ConfigError(f"--deepspeed_config {path}: zero_optimization.offload_param is not planned for; remove it")
    micro_batch, accumulation = config.get("train_micro_batch_size_per_gpu") or 1, given.accumulation
    axes = ds_training.model_axes(config)
    axes |= {name: value for name in axes if (value := getattr(given, name)) is not None}
    if accumulation is None:
        try:
            batch = ds_training.batch_sizes(config, max(1, given.world_size // max(1, math.prod(axes.values()))))
        except ConfigError as error:
            raise ConfigError(f"--deepspeed_config {path}: {error}, or give --accumulation") from error
        accumulation, micro_batch = batch.accumulation, batch.micro_batch
    values = {
        "layout": f"zero{ds_training.zero_stage(config)}",
        "precision": ds_training.precision(config),
        "accumulation": accumulation,
        "micro_batch": micro_batch,
        "offload": (section.get("offload_optimizer") or {}).get("device", "none") == "cpu" and layout != "ddp",
        "zero": _zero(path, section),
        "checkpointing": bool((config.get("pipeline") or {}).get("activation_checkpoint_interval")),
        **axes,
    }
    params = config["optimizer"].get("params") or {}
    return (values, kind, dict(params)) if kind in CONFIGS else (values, "LoRAPre", {})


def _zero(path: str, section: dict[str, Any]) -> Zero:
    zero = Zero()
    for setting in fields(Zero):
        value: Any = section.get(setting.name, section.get(f"stage3_{setting.name}"))
        if value is None:
            continue
        flag = isinstance(getattr(zero, setting.name), bool) or setting.name == "overlap_comm"
        if isinstance(value, bool) is not flag or not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(
                f"--deepspeed_config {path}: zero_optimization.{setting.name}={value!r}: must be "
                + ("true or false" if flag else "a number of elements")
            )
        given: dict[str, Any] = {setting.name: value if flag else int(value)}
        zero = replace(zero, **given)
    return zero


def size_of(text: str) -> int:
    """Bytes of ``80GiB``, ``80G`` (the same) or ``85899345920``.

    Raises:
        ConfigError: not a size, or one that no device has, as of a number whose unit was forgotten.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B?)\s*", text, re.IGNORECASE)
    if not found or float(found.group(1)) == 0:
        raise ConfigError(f"--max_memory {text}: must be a size such as 80GiB or 40960MiB")
    size = int(float(found.group(1)) * UNITS[(found.group(2) or "").upper()])
    if size < SMALLEST_MEMORY:
        raise ConfigError(f"--max_memory {text}: is {size:,} bytes; give a unit, such as {found.group(1)}GiB")
    return size


def _fits(request: Request, limit: int) -> dict[str, int | None]:
    """From how many ranks our optimizer fits, by layout; those that the options are not for are left out."""
    found: dict[str, int | None] = {}
    for name in OFFLOADING if request.offload else LAYOUTS:
        with contextlib.suppress(ConfigError):
            found[name] = smallest_world(replace(request, layout=name, world_size=request.model_ranks), limit)
    return found
