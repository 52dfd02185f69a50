"""Zero-shot classification: labels and templates become a classifier matrix, which scores images; and the pipeline."""
