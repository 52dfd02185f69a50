"""Evaluation of CLIP models. `metrics` are functions of tensors that need no model."""
