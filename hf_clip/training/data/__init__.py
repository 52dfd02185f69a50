"""The data of contrastive training: pairs, batches, and rows that cannot be used."""
