"""The data of contrastive training: sources, columns, pairs, batches, and rows that cannot be used."""
