"""Small things that the optimizers do with parameters: what they are given, and how they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from typing import Any

from torch import Tensor

from ..config.checks import ConfigError, shown
from ..core.comm import Comm
from ..layouts.base import Layout


def number(lr: Any) -> Any:
    """A learning rate that is a tensor of one element, as PyTorch allows, as a number."""
    return lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 and not lr.is_meta else lr


def stays_on_device(lr: Any) -> bool:
    """Whether a learning rate is a number (0-d) on an accelerator, where a step uses it without looking at it."""
    return isinstance(lr, Tensor) and lr.ndim == 0 and lr.is_floating_point() and lr.device.type != "cpu"


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options among a constructor's arguments (its ``locals()``), also those that it does not know.

    They go on by name to the settings, which refuse what is unknown and say what may have been meant.
    """
    options = {key: value for key, value in arguments.items() if key not in ("self", "params", "unknown", "__class__")}
    return options | arguments["unknown"]


def may_step(parameter: Tensor) -> bool:
    """Whether a parameter is, or once was, trained."""
    return parameter.requires_grad or parameter.grad is not None


def check_given(group: Any) -> None:
    """Check what is given as a parameter group before PyTorch takes it; what it holds is made a list, in place.

    Raises:
        ConfigError, TypeError: it is no group of tensors, or of pairs of a name and a tensor.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise ConfigError(f"{shown(group)}: a parameter group must be a dict with 'params'")
    given, allowed = group["params"], "must be tensors, or pairs of a name and a tensor"
    if not isinstance(given, Iterable):
        raise TypeError(f"params={shown(given)}: {allowed}")
    if isinstance(given, (Tensor, set)):  # of which PyTorch knows what to say
        return
    group["params"] = list(given)
    for one in group["params"]:
        if isinstance(one, tuple) and len(one) != 2:
            raise TypeError(f"params holds {shown(one)}: {allowed}")


def name_empty(groups: list[dict[str, Any]]) -> None:
    """Give groups without parameters (a stage of a pipeline may have none of a group) no names, if others have some.

    PyTorch wants all groups with names, or none.
    """
    if any("param_names" in group or any(isinstance(one, tuple) for one in group["params"]) for group in groups):
        for group in groups:
            if not isinstance(group["params"], Tensor) and not len(group["params"]):
                group.setdefault("param_names", [])


def check_tensors(group: dict[str, Any], optimizer: str) -> None:
    """Raise a ConfigError unless the tensors of a group are real, and their names, if there are some, strings."""
    names = group.get("param_names", [f"number {k}" for k in range(len(group["params"]))])
    if not isinstance(names, (list, tuple)):
        raise ConfigError(f"param_names={shown(names)}: must be a list of strings")
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong or len(names) != len(group["params"]):
        what = shown(wrong[0] if wrong else names)
        raise ConfigError(f"parameter name {what}: each parameter of a group must have one, a string")
    for name, p in zip(names, group["params"], strict=True):
        if not p.is_floating_point():
            raise ConfigError(f"parameter {name} is of {p.dtype}: {optimizer} steps real numbers")


def refuse_duplicates(names: list[str]) -> None:
    """Raise a ConfigError if a name appears twice."""
    if len(names) != len(set(names)):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ConfigError(f"parameter {twice!r} appears twice in the optimizer's groups")


def flat(tensor: Tensor) -> Tensor:
    """The tensor's elements, row-major: a view, or a copy if they do not lie so."""
    return tensor.detach().contiguous().view(-1)


def send_stepped(layout: Layout, stepped: Container[int], comm: Comm, limit: int) -> None:
    """Where each rank has stepped a part of the parameters: let all have all, by at most ``limit`` bytes at a time.

    Args:
        stepped: ids of the parameters that some rank has stepped.
    """
    sends = [s for s in layout.sends if id(s.tensor) in stepped]
    if sends:
        flats = {id(s.tensor): flat(s.tensor) for s in sends}
        parts = [(s.owner, flats[id(s.tensor)][s.start : s.stop]) for s in sends]
        comm.broadcast(parts, layout.group, "broadcast parameters", limit)()
        for tensor in {id(s.tensor): s.tensor for s in sends if not s.tensor.is_contiguous()}.values():
            tensor.copy_(flats[id(tensor)].view(tensor.shape))
