#!/usr/bin/env python
"""Fine-tune a causal LM: ``deepspeed launch/finetune.py --model M --deepspeed_config X.json --dataset metamath``."""

import os
import sys

from lorapre_dist.training.finetune.app import main
from lorapre_dist.training.run.interruption import outlive_the_terminal

if __name__ == "__main__":
    outlive_the_terminal()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # see launch/pretrain.py
