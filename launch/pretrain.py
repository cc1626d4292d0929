#!/usr/bin/env python
"""Pre-train a causal LM: ``deepspeed launch/pretrain.py --model llama-1b --deepspeed_config X.json --dataset c4``."""

import os
import sys

from lorapre_dist.training.run.app import main
from lorapre_dist.training.run.interruption import outlive_the_terminal

if __name__ == "__main__":
    outlive_the_terminal()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written and closed. Now and then the teardown of the interpreter ended in "terminate called without
    # an active exception" of some library's thread, and the launcher would take a finished run for a failed one.
    os._exit(code)
