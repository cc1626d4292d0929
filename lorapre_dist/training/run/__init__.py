"""A run: settings, the loop, its checkpoints, metrics and end."""
