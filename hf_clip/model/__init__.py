"""The model and its processor: the code that loads, runs and saves them.

All files in this folder, and no others, are copied to a Hub repository as remote code. The Hub's loader copies only
flat files. They import one another as `from .file import name`, and nothing from the rest of the package.
"""
