"""A small CLIP from scratch on handwritten digits: `make demo`. Data, programs and report; no library code."""
