"""Seconds of an optimizer's step, predicted from stated rates: nothing here has been measured.

Local work takes as long as its slowest part: products by the rate of flops, numbers moved by the memory's bandwidth,
or operations by the time of starting one. Then come the solves, which are too small for the units that products have,
and the collectives, of which each has the latency of a start. Nothing is taken to overlap with anything else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from lorapre_dist.config import ConfigError

from .plan import Usage


@dataclass(frozen=True)
class Rates:
    """What a rank's device does, on average, in practice.

    Attributes:
        flops: of matrix products a second, in fp32 or TF32.
        bandwidth: bytes of its memory a second.
        network: bytes that a rank sends a second.
        launch: seconds that starting an operation takes.
        solve: flops of Cholesky factors and inverses a second.
        latency: seconds of a collective beside its bytes.
    """

    flops: float
    bandwidth: float
    network: float
    launch: float = 5e-6
    solve: float = 1e12
    latency: float = 30e-6

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"--{name} {value:g}: must be a positive number")


#: Assumed of devices by name: about half of what the makers state, of TF32, HBM and a link of 400 Gbit/s a device.
DEVICES = {
    "a100": Rates(flops=80e12, bandwidth=1.3e12, network=25e9),
    "h100": Rates(flops=250e12, bandwidth=2.2e12, network=40e9, solve=2e12),
}


@dataclass(frozen=True)
class Seconds:
    """Of a step on the rank with most to do.

    Attributes:
        compute: products, numbers moved and operations started, whichever takes longest.
        solves: the r x r ones.
        network: the optimizer's collectives.
        bound: what ``compute`` follows from.
        framework: the collectives of the framework around it, of all micro-batches of a step, in the same rings.
    """

    compute: float
    solves: float
    network: float
    bound: str
    framework: float

    @property
    def step(self) -> float:
        """The optimizer's own."""
        return self.compute + self.solves + self.network


def seconds(usage: Usage, rates: Rates) -> Seconds:
    """The prediction for one optimizer."""
    work = usage.work
    parts = {
        "products": work.products / rates.flops,
        "memory": work.moved / rates.bandwidth,
        "launches": work.calls * rates.launch,
    }
    bound = max(parts, key=lambda name: parts[name])
    sent = max((float(sum(values)) for values in zip(*usage.sent.values(), strict=True)), default=0.0)
    framework = float(np.max(sum(usage.frame_sent.values(), np.zeros(1)))) / rates.network
    network = sent / rates.network + usage.calls * rates.latency
    return Seconds(parts[bound], work.solves / rates.solve, network, bound, framework)


def rates_of(device: str | None, given: dict[str, float]) -> Rates | None:
    """Those of a named device, with what is ``given`` instead; None: nothing was asked for.

    Raises:
        ConfigError: a rate is missing, or is none.
    """
    if device is None and not given:
        return None
    if device is not None:
        return replace(DEVICES[device], **given)
    missing = [f"--{name}" for name in ("flops", "bandwidth", "network") if name not in given]
    if missing:
        devices = ", ".join(DEVICES)
        raise ConfigError(f"{', '.join(missing)}: needed to predict seconds, or --device with one of {devices}")
    return Rates(**given)


def rate(text: str) -> float:
    """``300e12``, ``300T`` or ``50G``: a number, perhaps with a unit of thousands.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"([0-9.]+(?:e[-+]?\d+)?)\s*([kMGTP]?)", text.strip())
    if not found:
        raise ValueError(text)
    return float(found.group(1)) * 1000 ** " kMGTP".index(found.group(2) or " ")
