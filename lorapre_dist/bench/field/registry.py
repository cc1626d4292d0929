"""All contenders by name, in the order in which they are run."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools

from lorapre_dist.config import ConfigError

from . import ours, packages
from .contender import Contender
from .relatives import RELATIVES

CONTENDERS: dict[str, Contender] = {
    "adamw": packages.TORCH["adamw"],
    "lorapre-8": ours.lorapre("LoRAPre", 8),
    "lorapre-32": ours.lorapre("LoRAPre", 32),
    "lorapre-muon-8": ours.muon(8),
    "lorapre-muon-32": ours.muon(32),
    "muon": packages.TORCH["muon"],
    **packages.PACKAGES,
    **RELATIVES,
    "adafactor": packages.TORCH["adafactor"],
    "lorapre-adafactor-8": ours.lorapre("LoRAPreAdafactor", 8),
    "lorapre-lion-8": ours.lion(8),
    "lorapre-paper-8": ours.paper(8),
}

#: What is there to be studied, and no contender of the table.
STUDIED = {"lorapre-dense-8": ours.exchanged(8), "lorapre-dense-32": ours.exchanged(32)}


@functools.cache
def contender(name: str) -> Contender:
    """The contender of this name; ours and torch's may be followed by options: ``lorapre-8+residual=0.1+scale=1``.

    Raises:
        ConfigError: there is no such contender, or what follows is not ``OPTION=VALUE``.
    """
    known, *given = name.split("+")
    every = CONTENDERS | STUDIED
    if known not in every:
        near = difflib.get_close_matches(known, every, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"unknown contender {known!r}: {hint}one of {', '.join(every)}")
    chosen = every[known]
    if not given:
        return chosen
    options = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"contender {name!r}: {option!r} must be OPTION=VALUE")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    if known not in packages.TORCH and not known.startswith("lorapre"):
        tunable = ", ".join(packages.TORCH)
        raise ConfigError(f"contender {name!r}: options can be given to ours and {tunable} alone, not to {known}")
    label = f"{chosen.label}, {', '.join(given)}"
    return dataclasses.replace(chosen, label=label, build=functools.partial(chosen.build, **options))
