"""Faster inference with the same results: what is measured, what is replaced, and what is refused."""
