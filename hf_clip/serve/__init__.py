"""The HTTP server: one model in memory, and the requests of several kinds of clients."""
