"""From text to sequences of tokens, the same ones at any number of ranks."""
