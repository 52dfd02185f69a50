"""Search one's own images: an index of embeddings that is kept up to date, and queries by text and by image."""
