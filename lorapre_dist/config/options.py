"""Settings of the optimizers: defaults, validation, and the JSON ``optimizer.params``."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from .checks import ConfigError, boolean, check_expression, choice, integer, number, pair, several, shown
from .instead import ELSEWHERE

if TYPE_CHECKING:
    from typing_extensions import Self


VARIANTS = ("stable", "paper")
STATE_DTYPES = ("fp32", "bf16", "8bit")
OTHER_STATES = ("adamw", "adamw8bit", "adafactor")
EMBEDDINGS = ("full", "low_rank")
#: The values of ``weights`` that are for bf16 weights without an fp32 copy.
SIXTEEN = ("stochastic", "kahan")
WEIGHTS = (None, "master", *SIXTEEN)
WORKS = ("rows", "matrices")
KERNELS = ("auto", "eager", "compile", "triton")
ADJUSTMENTS = ("original", "match_rms_adamw", None)


@dataclass(frozen=True)
class LowRankConfig:
    """What the settings of all our optimizers share.

    Attributes:
        lr: learning rate; schedulers change it per group.
        weight_decay: decoupled, applied as ``theta -= lr * weight_decay * theta``.
        rank: rank ``r`` of the first moment's factors; 0 (in a parameter group) means plain AdamW.
        variant: ``"stable"`` (six changes: docs/guide/stable_and_paper.md) or ``"paper"`` (literal).
        residual: weight of the fresh gradient's part outside the tracked subspace.
        damping: of the r x r Gram solves; default 1e-4 times the mean eigenvalue, in ``paper`` 1e-6 absolute.
        init_std: standard deviation of the initial ``A`` factors; ``stable`` makes their rows orthonormal.
        target_modules: which weights are low-rank, see :func:`lorapre_dist.config.param_groups.matches`.
        seed: with the parameter's name, determines the initial factors.
        max_skipped: steps in a row with a gradient that is not finite after which ``step`` raises an error.
        state_dtype: in which form the factors are kept between steps: ``"fp32"``, ``"bf16"``, or ``"8bit"`` with a
            scale for each row of ``B`` and column of ``A``; a step reckons in fp32 and rounds stochastically.
        other_state: what is kept of the 2-D parameters that are no low-rank matrices: ``"adamw"``, ``"adamw8bit"``, the
            same two numbers an element in 8 bits each with scales for every row, or ``"adafactor"``, the means of the
            gradient's square over rows and columns, and no first moment.
        embeddings: ``"low_rank"`` gives embedding and output layer low-rank momenta, too, stepped at AdamW's settings;
            ``"full"`` leaves them to ``other_state``.
        release_gradients: step each parameter in the backward pass, as soon as its gradient is complete, and forget the
            gradient; the same in all parameter groups, see :mod:`lorapre_dist.optimizers.release`.
        clip_each: norm to which each parameter's gradient is scaled down by itself, where gradients are released: their
            global norm is not known before all have been used.
        weights: how bf16 weights that have no fp32 copy are stepped. ``"stochastic"``: rounded up or down at random, so
            that on average nothing is lost. ``"kahan"``: rounded to the nearest, with the 16 bits that a bf16 weight
            lacks of its fp32 value kept beside it, as state: the very steps of fp32 weights, at their memory.
            ``"master"``, also None: rounded to the nearest, which is for weights that are fp32, or have an fp32 copy.
        work: how ranks that share matrices divide a step: ``"rows"``, of which each has some of every matrix, or
            ``"matrices"``, which are brought together on one rank each and sent back: less to compute and to send
            where a rank holds fewer rows of a matrix than its factors' rank; see :mod:`lorapre_dist.core.whole`.
        overlap: let what the weights do not wait for (sums, solves, the new factors) run behind the next forward and
            backward, see :mod:`lorapre_dist.core.step`; the result has the same bits. It takes memory between steps,
            stated as ``overlap_bytes`` in ``memory_report()``.
        overlap_limit: refuse ``overlap`` where it would keep more bytes than this on a rank; default: no limit.
        kernels: form of the elementwise part of a step: ``"eager"``, ``"compile"`` (``torch.compile``: on a CPU it
            takes a C++ compiler), ``"triton"`` (kernels, on CUDA), or ``"auto"``: that where it can run, else eager.
            Results differ by rounding; see :mod:`lorapre_dist.core.kernels`. Steps of Muon, Lion and SGD are eager.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    rank: int = 128
    variant: str = "stable"
    residual: float | None = None
    damping: float | None = None
    init_std: float = 0.02
    target_modules: str | tuple[str, ...] | None = None
    seed: int = 0
    max_skipped: int = 20
    state_dtype: str = "fp32"
    other_state: str = "adamw"
    embeddings: str = "full"
    release_gradients: bool = False
    clip_each: float | None = None
    weights: str | None = None
    work: str = "rows"
    overlap: bool = False
    overlap_limit: int | None = None
    kernels: str = "auto"

    # No fields: the name of the optimizer, its residual weight in ``stable`` (in ``paper`` it is 0), and the step size
    # below which next to nothing is learned from scratch: a fiftieth of what is usual.
    optimizer = "LoRAPre"
    default_residual = 0.0
    least_step_size = 2e-5

    def __post_init__(self) -> None:
        for field in fields(self):
            if "tuple" in str(field.type) and isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        self._check_numbers()
        choice("variant", self.variant, VARIANTS)
        choice("state_dtype", self.state_dtype, STATE_DTYPES)
        choice("other_state", self.other_state, OTHER_STATES)
        choice("embeddings", self.embeddings, EMBEDDINGS)
        boolean("release_gradients", self.release_gradients)
        if self.clip_each is not None:
            number("clip_each", self.clip_each, low=0.0, low_open=True)
            if not self.release_gradients:
                raise ConfigError(
                    f"clip_each={self.clip_each}: is for gradients that are released (release_gradients=true); else "
                    "clip all of them by their global norm (gradient_clipping, or torch.nn.utils.clip_grad_norm_)"
                )
        choice("weights", self.weights, WEIGHTS)
        choice("kernels", self.kernels, KERNELS)
        choice("work", self.work, WORKS)
        targets = self.target_modules
        names = isinstance(targets, tuple) and targets and all(isinstance(t, str) and t for t in targets)
        if not (targets is None or isinstance(targets, str) or names):
            raise ConfigError(f"target_modules={shown(targets)}: must be a regular expression or a list of names")
        for entry in [targets] if isinstance(targets, str) else targets or ():
            check_expression(entry)

    def _check_numbers(self) -> None:
        number("lr", self.lr, low=0.0)
        number("weight_decay", self.weight_decay, low=0.0)
        integer("rank", self.rank, low=0)
        if self.residual is not None:
            number("residual", self.residual, low=0.0, high=1.0)
        if self.damping is not None:
            number("damping", self.damping, low=0.0, low_open=True)
        number("init_std", self.init_std, low=0.0, low_open=True)
        integer("seed", self.seed, low=0)
        integer("max_skipped", self.max_skipped, low=1)
        boolean("overlap", self.overlap)
        if self.overlap_limit is not None:
            integer("overlap_limit", self.overlap_limit, low=0)
        if self.overlap and self.work == "matrices":
            raise ConfigError("overlap=true with work='matrices': overlap is for steps by rows; leave one of them out")
        if self.overlap and (self.release_gradients or self.state_dtype != "fp32"):
            other = "release_gradients=true" if self.release_gradients else f"state_dtype={self.state_dtype!r}"
            raise ConfigError(f"overlap=true with {other}: one is for time, the other for memory: leave one out")

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """The settings in a DeepSpeed JSON's ``optimizer.params``.

        Raises:
            ConfigError: an unknown name (the nearest valid one is suggested), a bad value, or ``rank`` 0.
        """
        known = [f.name for f in fields(cls)]
        for name in params:
            if name in ELSEWHERE:
                raise ConfigError(f"{cls.optimizer} has no option {name!r}: {ELSEWHERE[name]}")
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known options: {', '.join(known)}"
                raise ConfigError(f"unknown {cls.optimizer} option {name!r}{hint}")
        config = cls(**params)
        if config.rank == 0:
            raise ConfigError("rank=0: must be at least 1 (rank 0 is for parameter groups that shall take AdamW)")
        return config

    def as_defaults(self) -> dict[str, Any]:
        """The settings as a parameter group's defaults; None where the default depends on other settings."""
        return asdict(self)

    @property
    def step_size(self) -> float:
        """What the normalised update of a matrix is multiplied by."""
        return self.lr * getattr(self, "scale", 1.0)

    @functools.cached_property
    def resolved_rank_v(self) -> int:
        """Rank of the second moment's factors; 0 where there are none."""
        return 0

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of the factors by moment."""
        return {"m": self.rank}

    @property
    def forms(self) -> dict[str, str]:
        """In which form the factors are kept, by moment."""
        return dict.fromkeys(self.ranks, self.state_dtype)

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of a matrix's statistics, see :class:`lorapre_dist.core.factors.Matrix`."""
        return ()

    @functools.cached_property
    def resolved_residual(self) -> float:
        """Residual weight with the variant's default filled in."""
        if self.residual is not None:
            return self.residual
        return 0.0 if self.variant == "paper" else self.default_residual

    @functools.cached_property
    def resolved_damping(self) -> float:
        """Damping with the variant's default filled in (relative in ``stable``, absolute in ``paper``)."""
        if self.damping is not None:
            return self.damping
        return 1e-6 if self.variant == "paper" else 1e-4


@dataclass(frozen=True)
class AdamConfig(LowRankConfig):
    """What LoRA-Pre's forms of Adam share.

    Attributes:
        lr: of every parameter; matrices take steps of ``lr * scale``, so who comes from AdamW gives four times its lr,
            or ``scale=1`` (:meth:`lorapre_dist.LoRAPre.from_adamw`).
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the square root of the second moment.
        scale: multiplies the normalised update of low-rank parameters, not their weight decay (GaLore's factor).
        residual: default ``betas[0]``, in ``paper`` 0. With that much a gradient's part outside the tracked subspace
            weighs 1 in the sum of all updates, as what is inside does.
        max_update: bound on each element of the normalised update, before ``lr`` and ``scale``; default 3 (AdamW itself
            stays near 1, and seldom goes to 3), in ``paper`` none.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    scale: float = 0.25
    max_update: float | None = None

    def _check_numbers(self) -> None:
        super()._check_numbers()
        pair("betas", self.betas, low=0.0, high=1.0, high_open=True)
        number("eps", self.eps, low=0.0)
        number("scale", self.scale, low=0.0)
        if self.max_update is not None:
            number("max_update", self.max_update, low=0.0, low_open=True)

    @functools.cached_property
    def default_residual(self) -> float:  # type: ignore[override]
        """What fades from the momentum."""
        return self.betas[0]

    @functools.cached_property
    def resolved_max_update(self) -> float:
        """Bound on an element of the normalised update with the variant's default filled in."""
        if self.max_update is not None:
            return self.max_update
        return math.inf if self.variant == "paper" else 3.0


@dataclass(frozen=True)
class LoRAPreConfig(AdamConfig):
    """Settings of :class:`lorapre_dist.LoRAPre` (arXiv 2602.24283, Algorithm 1, and its ``stable`` variant).

    Attributes:
        rank_v: rank of the second moment's factors; default ``max(1, rank // 8)``, in ``paper`` it is ``rank``.
        gammas: refresh rates of the first and second moment's factors, each in (0, 1];
            default ``1 - sqrt(beta1)`` and ``1 - beta2 ** (1/4)``.
    """

    rank_v: int | None = None
    gammas: tuple[float, float] | None = None

    def _check_numbers(self) -> None:
        super()._check_numbers()
        if self.rank_v is not None:
            integer("rank_v", self.rank_v, low=1)
        if self.gammas is not None:
            pair("gammas", self.gammas, low=0.0, high=1.0, low_open=True)

    @functools.cached_property
    def resolved_rank_v(self) -> int:
        """Rank of the second moment's factors with the variant's default filled in."""
        if self.rank_v is not None:
            return self.rank_v
        return self.rank if self.variant == "paper" else max(1, self.rank // 8)

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of the factors by moment."""
        return {"m": self.rank, "v": self.resolved_rank_v}

    @property
    def vectors(self) -> tuple[str, ...]:
        """Row energies, in ``stable``."""
        return ("rms_row",) if self.variant == "stable" else ()

    @functools.cached_property
    def resolved_gammas(self) -> tuple[float, float]:
        """Refresh rates with the coupling of the paper filled in: ``1 - sqrt(beta1)``, ``1 - beta2 ** (1/4)``."""
        if self.gammas is not None:
            return self.gammas
        return 1.0 - math.sqrt(self.betas[0]), 1.0 - self.betas[1] ** 0.25


@dataclass(frozen=True)
class LoRAPreAdafactorConfig(AdamConfig):
    """Settings of :class:`lorapre_dist.LoRAPreAdafactor`: as :class:`LoRAPreConfig`, without a low-rank second moment.

    Attributes:
        betas, eps, scale, max_update: as there; the second beta decays the means of ``g^2`` over rows and columns.
        gamma: refresh rate of the factors, in (0, 1]; default ``1 - sqrt(beta1)``.
    """

    gamma: float | None = None

    optimizer = "LoRAPreAdafactor"

    def _check_numbers(self) -> None:
        super()._check_numbers()
        if self.gamma is not None:
            number("gamma", self.gamma, low=0.0, high=1.0, low_open=True)

    @property
    def vectors(self) -> tuple[str, ...]:
        """Means of ``g^2`` over rows and columns."""
        return ("rms_row", "rms_col")

    @functools.cached_property
    def resolved_gammas(self) -> tuple[float, float]:
        """Refresh rate with the coupling of the paper filled in, and 0.0: the second moment has no factors."""
        return self.gamma if self.gamma is not None else 1.0 - math.sqrt(self.betas[0]), 0.0


@dataclass(frozen=True)
class MomentumConfig(LowRankConfig):
    """What the optimizers with one factored moment share; every other parameter takes AdamW with its own settings.

    Attributes:
        lr: of the low-rank matrices.
        gamma: refresh rate of the factors, in (0, 1]; default 1 minus the square root of the momentum's decay.
        adamw_lr: learning rate of all other parameters; it follows a schedule of ``lr`` in proportion.
        adamw_betas, adamw_eps, adamw_weight_decay: their other settings, as in ``torch.optim.AdamW``.
    """

    gamma: float | None = None
    adamw_lr: float = 1e-3
    adamw_betas: tuple[float, float] = (0.9, 0.999)
    adamw_eps: float = 1e-8
    adamw_weight_decay: float = 0.0

    def _check_numbers(self) -> None:
        super()._check_numbers()
        if self.gamma is not None:
            number("gamma", self.gamma, low=0.0, high=1.0, low_open=True)
        number("adamw_lr", self.adamw_lr, low=0.0)
        pair("adamw_betas", self.adamw_betas, low=0.0, high=1.0, high_open=True)
        number("adamw_eps", self.adamw_eps, low=0.0)
        number("adamw_weight_decay", self.adamw_weight_decay, low=0.0)

    @property
    def decay(self) -> float:
        """Of the factored momentum, per step."""
        raise NotImplementedError

    @functools.cached_property
    def resolved_gamma(self) -> float:
        """Refresh rate with the coupling of the paper filled in: the product of two factors decays by ``decay``."""
        return self.gamma if self.gamma is not None else 1.0 - math.sqrt(self.decay)


@dataclass(frozen=True)
class LoRAPreMuonConfig(MomentumConfig):
    """Settings of :class:`lorapre_dist.LoRAPreMuon` (arXiv 2602.24283, Algorithm 2).

    Attributes:
        weight_decay, ns_coefficients, eps, ns_steps: as in ``torch.optim.Muon``, with its defaults.
        momentum: as there; default 0.8, in ``paper`` 0.95 as there. What lies outside the tracked subspace has none, so
            that a long one inside makes its steps count for little.
        nesterov: default True as there, in ``paper`` False, as printed.
        adjust_lr_fn: scaling of a p x q matrix's update: ``"original"``, also None: ``max(1, p/q)^0.5``;
            ``"match_rms_adamw"``: ``0.2 max(p, q)^0.5``.
        residual: default 0.
    """

    weight_decay: float = 0.1
    momentum: float | None = None
    nesterov: bool | None = None
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str | None = None

    optimizer = "LoRAPreMuon"

    @property
    def least_step_size(self) -> float:  # type: ignore[override]
        """Of an orthogonal update, whose usual lr is 0.02, or that of AdamW."""
        return 2e-5 if self.adjust_lr_fn == "match_rms_adamw" else 4e-4

    def _check_numbers(self) -> None:
        super()._check_numbers()
        if self.momentum is not None:
            number("momentum", self.momentum, low=0.0, high=1.0, high_open=True)
        boolean("nesterov", self.nesterov, optional=True)
        several("ns_coefficients", self.ns_coefficients, 3)
        for coefficient in self.ns_coefficients:
            number("ns_coefficients", coefficient, low=-100.0, high=100.0)
        number("eps", self.eps, low=0.0, low_open=True)
        integer("ns_steps", self.ns_steps, low=1)
        if self.ns_steps >= 100:
            raise ConfigError(f"ns_steps={self.ns_steps}: must be less than 100")
        choice("adjust_lr_fn", self.adjust_lr_fn, ADJUSTMENTS)

    @property
    def decay(self) -> float:
        """Of the heavy-ball momentum."""
        return self.resolved_momentum

    @functools.cached_property
    def resolved_momentum(self) -> float:
        """The momentum, with the variant's default filled in."""
        default = 0.8 if self.variant == "stable" else 0.95
        return default if self.momentum is None else self.momentum

    @functools.cached_property
    def resolved_nesterov(self) -> bool:
        """Whether the update looks ahead, with the variant's default filled in."""
        return self.variant == "stable" if self.nesterov is None else self.nesterov

    def adjusted_lr(self, shape: tuple[int, int]) -> float:
        """Learning rate of a p x q matrix's orthogonal update."""
        p, q = shape
        if self.adjust_lr_fn == "match_rms_adamw":
            return self.lr * 0.2 * math.sqrt(max(p, q))
        return self.lr * math.sqrt(max(1.0, p / q))


@dataclass(frozen=True)
class LoRAPreSGDConfig(MomentumConfig):
    """Settings of :class:`lorapre_dist.LoRAPreSGD`: ``torch.optim.SGD`` with momentum, but decoupled weight decay.

    Attributes:
        momentum: of the heavy-ball momentum ``m = momentum * m + g``.
        nesterov: as in ``torch.optim.SGD``.
        residual: times ``1 / (1 - momentum)``; default 0.3.
    """

    momentum: float = 0.9
    nesterov: bool = False

    optimizer = "LoRAPreSGD"
    default_residual = 0.3
    least_step_size = 0.0  # the gradient's own size counts

    def _check_numbers(self) -> None:
        super()._check_numbers()
        number("momentum", self.momentum, low=0.0, high=1.0, high_open=True)
        boolean("nesterov", self.nesterov)

    @property
    def decay(self) -> float:
        """Of the heavy-ball momentum."""
        return self.momentum


@dataclass(frozen=True)
class LoRAPreLionConfig(MomentumConfig):
    """Settings of :class:`lorapre_dist.LoRAPreLion` (arXiv 2302.06675, with a low-rank momentum).

    Attributes:
        betas: weight of the momentum in the update, and its decay; each in [0, 1).
        residual: default 0.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)

    optimizer = "LoRAPreLion"
    least_step_size = 2e-6

    def _check_numbers(self) -> None:
        super()._check_numbers()
        pair("betas", self.betas, low=0.0, high=1.0, high_open=True)

    @property
    def decay(self) -> float:
        """Of the momentum."""
        return self.betas[1]


#: By the name under which a DeepSpeed JSON asks for the optimizer.
CONFIGS: dict[str, type[LowRankConfig]] = {
    config.optimizer: config
    for config in (LoRAPreConfig, LoRAPreMuonConfig, LoRAPreSGDConfig, LoRAPreLionConfig, LoRAPreAdafactorConfig)
}
