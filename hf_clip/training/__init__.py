"""The parts of contrastive training. `finetune.py` at the root of the repository puts them together."""
