"""The first lines of a program in which hf_clip cannot be imported, as where it isn't installed."""

BLOCK_HF_CLIP = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_clip":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""
