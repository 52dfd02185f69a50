"""Zero-shot classification: labels × templates → a classifier matrix, its scores, and the pipeline."""
