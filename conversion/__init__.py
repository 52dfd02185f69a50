"""Programs around the package, run from a checkout: convert and check checkpoints."""
