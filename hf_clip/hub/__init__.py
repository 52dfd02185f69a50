"""Publish a model on the Hub: its files, the code that loads them, and its card."""
