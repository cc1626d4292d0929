"""The Hugging Face ``Trainer`` and Accelerate."""

from ...config import extras

extras.need("hf")
