#!/usr/bin/env python
"""Pre-train a causal LM: ``deepspeed launch/pretrain.py --model llama-1b --deepspeed_config X.json --dataset c4``."""

import sys

from lorapre_dist.training.app import main

if __name__ == "__main__":
    sys.exit(main())
