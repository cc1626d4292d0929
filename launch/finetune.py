#!/usr/bin/env python
"""Fine-tune a causal LM: ``deepspeed launch/finetune.py --model M --deepspeed_config X.json --dataset metamath``."""

from lorapre_dist.training.finetune.app import main
from lorapre_dist.training.run.program import script

if __name__ == "__main__":
    script(main)
