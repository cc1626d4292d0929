"""Settings of the optimizer: defaults, validation, and the JSON ``optimizer.params``."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

VARIANTS = ("stable", "paper")


class ConfigError(ValueError):
    """Bad user input. The message is one line that names the value, what is allowed and what to do."""


@dataclass(frozen=True)
class LoRAPreConfig:
    """Settings of :class:`lorapre_dist.LoRAPre` (arXiv 2602.24283, Algorithm 1, and its ``stable`` variant).

    Attributes:
        lr: learning rate of every parameter; schedulers change it per group.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the square root of the second moment.
        weight_decay: decoupled, applied as ``theta -= lr * weight_decay * theta``.
        rank: rank ``r`` of the first moment's factors; 0 (in a parameter group) means plain AdamW.
        rank_v: rank of the second moment's factors; default ``max(1, rank // 8)``, in ``paper`` it is ``rank``.
        scale: multiplies the normalised update of low-rank parameters, not their weight decay (GaLore's factor).
        variant: ``"stable"`` (relative damping, alternating refresh, row energies, residual) or ``"paper"`` (literal).
        residual: weight of the fresh gradient's part outside the tracked subspace; default 0.3, in ``paper`` 0.
        damping: of the r x r Gram solves; default 1e-4 times the mean eigenvalue, in ``paper`` 1e-6 absolute.
        max_update: bound on each element of the normalised update, before ``lr`` and ``scale``; default 3 (AdamW itself
            stays near 1, and seldom goes to 3), in ``paper`` none.
        init_std: standard deviation of the initial ``A`` factors.
        gammas: refresh rates of the first and second moment's factors, each in (0, 1];
            default ``1 - sqrt(beta1)`` and ``1 - beta2 ** (1/4)``.
        target_modules: which 2-D weights are low-rank, see :func:`lorapre_dist.param_groups.matches`.
        seed: with the parameter's name, determines the initial factors.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    rank: int = 128
    rank_v: int | None = None
    scale: float = 0.25
    variant: str = "stable"
    residual: float | None = None
    damping: float | None = None
    max_update: float | None = None
    init_std: float = 0.02
    gammas: tuple[float, float] | None = None
    target_modules: str | tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("betas", "gammas", "target_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        self._check_numbers()
        if self.variant not in VARIANTS:
            raise ConfigError(f"variant={self.variant!r}: must be one of {', '.join(map(repr, VARIANTS))}")
        targets = self.target_modules
        names = isinstance(targets, tuple) and targets and all(isinstance(t, str) and t for t in targets)
        if not (targets is None or isinstance(targets, str) or names):
            raise ConfigError(f"target_modules={targets!r}: must be a regular expression or a list of names")
        for entry in [targets] if isinstance(targets, str) else targets or ():
            check_expression(entry)

    def _check_numbers(self) -> None:
        _number("lr", self.lr, low=0.0)
        _pair("betas", self.betas, low=0.0, high=1.0, high_open=True)
        _number("eps", self.eps, low=0.0)
        _number("weight_decay", self.weight_decay, low=0.0)
        _integer("rank", self.rank, low=0)
        if self.rank_v is not None:
            _integer("rank_v", self.rank_v, low=1)
        _number("scale", self.scale, low=0.0)
        if self.residual is not None:
            _number("residual", self.residual, low=0.0, high=1.0)
        if self.damping is not None:
            _number("damping", self.damping, low=0.0, low_open=True)
        if self.max_update is not None:
            _number("max_update", self.max_update, low=0.0, low_open=True)
        _number("init_std", self.init_std, low=0.0, low_open=True)
        if self.gammas is not None:
            _pair("gammas", self.gammas, low=0.0, high=1.0, low_open=True)
        _integer("seed", self.seed, low=0)

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> LoRAPreConfig:
        """The settings in a DeepSpeed JSON's ``optimizer.params``.

        Raises:
            ConfigError: an unknown name (the nearest valid one is suggested), a bad value, or ``rank`` 0.
        """
        known = [f.name for f in fields(cls)]
        for name in params:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known options: {', '.join(known)}"
                raise ConfigError(f"unknown LoRAPre option {name!r}{hint}")
        config = cls(**params)
        if config.rank == 0:
            raise ConfigError("rank=0: must be at least 1 (rank 0 is for parameter groups that shall take AdamW)")
        return config

    def as_defaults(self) -> dict[str, Any]:
        """The settings as a parameter group's defaults; None where the default depends on other settings."""
        return asdict(self)

    @property
    def resolved_rank_v(self) -> int:
        """Rank of the second moment's factors with the variant's default filled in."""
        if self.rank_v is not None:
            return self.rank_v
        return self.rank if self.variant == "paper" else max(1, self.rank // 8)

    @property
    def resolved_residual(self) -> float:
        """Residual weight with the variant's default filled in."""
        if self.residual is not None:
            return self.residual
        return 0.0 if self.variant == "paper" else 0.3

    @property
    def resolved_damping(self) -> float:
        """Damping with the variant's default filled in (relative in ``stable``, absolute in ``paper``)."""
        if self.damping is not None:
            return self.damping
        return 1e-6 if self.variant == "paper" else 1e-4

    @property
    def resolved_max_update(self) -> float:
        """Bound on an element of the normalised update with the variant's default filled in."""
        if self.max_update is not None:
            return self.max_update
        return math.inf if self.variant == "paper" else 3.0

    @property
    def resolved_gammas(self) -> tuple[float, float]:
        """Refresh rates with the coupling of the paper filled in: ``1 - sqrt(beta1)``, ``1 - beta2 ** (1/4)``."""
        if self.gammas is not None:
            return self.gammas
        return 1.0 - math.sqrt(self.betas[0]), 1.0 - self.betas[1] ** 0.25


def check_expression(entry: str) -> None:
    """Raise a ConfigError if an entry of ``target_modules`` is not a regular expression (a name always is one)."""
    try:
        re.compile(entry)
    except re.error as error:
        raise ConfigError(f"target_modules={entry!r}: not a valid regular expression ({error})") from None


def _number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    allowed = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open or high == math.inf else ']'}"
    # Written so that NaN, infinity and an integer beyond any float fail it.
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    ok = ok and (low < value if low_open else low <= value) and (value < high if high_open else value <= high)
    if not ok:
        raise ConfigError(f"{name}={value!r}: must be a number in {allowed}")


def _integer(name: str, value: Any, *, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}={value!r}: must be an integer of at least {low}")


def _pair(name: str, value: Any, **bounds: Any) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise ConfigError(f"{name}={value!r}: must be two numbers")
    for number in value:
        _number(name, number, **bounds)
