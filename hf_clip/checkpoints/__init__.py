"""Checkpoints in and out: every layout that is read and written, where files come from, and how they are kept whole."""
