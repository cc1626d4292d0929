"""Adapters that say which interval of every parameter lies where. Each one only translates."""
