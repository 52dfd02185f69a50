"""A small CLIP from scratch on handwritten digits: `make demo`. Data, programs and report; no library code."""

import os

# As in finetune.py, before torch is imported: threads that wait for work in a loop take the cores from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hf_clip.extras import missing_packages

if line := missing_packages("The demo", "demo"):  # before a module of it asks for one
    raise SystemExit(f"error: {line}")
