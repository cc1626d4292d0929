"""Fine-tuning of a causal LM on questions and answers, scored by generation (``launch/finetune.py``)."""
