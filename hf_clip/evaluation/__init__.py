"""Measuring a CLIP. `metrics` has the numbers, as functions of tensors that know no model."""
