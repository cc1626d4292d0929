"""The model, the engine that steps it, and the presets."""
