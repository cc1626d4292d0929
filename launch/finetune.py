#!/usr/bin/env python
"""Fine-tune a causal LM: ``deepspeed launch/finetune.py --model M --deepspeed_config X.json --dataset metamath``."""

import os
import sys

from lorapre_dist.training.finetune.app import main

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # see launch/pretrain.py
