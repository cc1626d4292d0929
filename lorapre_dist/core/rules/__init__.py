"""What one optimizer does within a step: its rule."""
