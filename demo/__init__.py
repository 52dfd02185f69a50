"""A small CLIP from scratch on handwritten digits: `make demo`. Data, programs and report; no library code."""

from hf_clip.extras import missing_packages

if line := missing_packages("The demo", "demo"):  # before a module of it asks for one
    raise SystemExit(f"error: {line}")
