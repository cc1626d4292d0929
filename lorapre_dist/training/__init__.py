"""The pre-training program: settings, models, data, the loop, metrics and checkpoints."""
