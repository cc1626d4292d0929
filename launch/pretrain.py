#!/usr/bin/env python
"""Pre-train a causal LM: ``deepspeed launch/pretrain.py --model llama-1b --deepspeed_config X.json --dataset c4``."""

from lorapre_dist.training.run.app import main
from lorapre_dist.training.run.program import script

if __name__ == "__main__":
    script(main)
