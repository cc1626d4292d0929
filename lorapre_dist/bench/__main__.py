"""``python -m lorapre_dist.bench NAME [options]``: runs ``lorapre_dist.bench.NAME``."""

from __future__ import annotations

import difflib
import importlib
import sys

from lorapre_dist.config import ConfigError

BENCHES = {
    "field": "every optimizer at its best lr with several seeds: loss, bytes of state, time of a step",
    "tracking": "cosine of every optimizer's updates to AdamW's, on AdamW's own path",
    "weights": "validation loss with bf16 weights kept in each way, against fp32 master weights",
    "gauges": "validation loss and condition of the factors under other gauges than the optimizer's",
    "step": "time of one optimizer step, against its bare GEMMs and a memory pass",
    "gpu": "time of a step on a GPU: what the host takes to start it, and the GPU to do it",
    "scaling": "time of one rank's step as ranks are added, and whether they wait in a chain",
    "launches": "operations that a step starts on a device, and times the host waits for it",
    "experts": "time of a step on many small matrices, stacked and one by one",
    "muon": "bytes sent and time of a distributed LoRAPreMuon step, against one process",
    "memory": "bytes of optimizer state and workspace per rank, and of training steps against the plan",
    "fits": "which models fit on which cards, with which options, by the planner",
    "checkpoint": "memory and time of saving, loading and consolidating",
    "soak": "does the optimizer's state stay sound over 50,000 steps of every kind of gradient",
}
USAGE = "usage: python -m lorapre_dist.bench NAME [options]   (NAME --help lists the options)\n\n" + "\n".join(
    f"  {name:<11} {what}" for name, what in BENCHES.items()
)


def main(argv: list[str]) -> int:
    """Run the bench named first in ``argv``; the exit code is 0, or 2 after one line about bad input."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    try:
        if argv[0] not in BENCHES:
            near = difflib.get_close_matches(argv[0], BENCHES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"unknown bench {argv[0]!r}: {hint}one of {', '.join(BENCHES)}")
        importlib.import_module(f"lorapre_dist.bench.{argv[0]}").main(argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
