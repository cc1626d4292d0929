"""The Hugging Face ``Trainer`` and Accelerate."""
