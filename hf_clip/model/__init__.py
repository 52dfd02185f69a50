"""The model and its processor: what loads, runs and saves them.

Everything in this folder travels to a Hub repository as remote code, and nothing else does. The Hub's loader copies
flat files: they import one another from this folder alone, and nothing of the rest of the package.
"""
