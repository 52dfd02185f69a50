"""Read and write CLIP checkpoints in every layout.

`read.py` reads any layout, `write.py` writes any layout, and `conversion.py` does both. The other files serve these.
"""
