"""Side-by-side measurements against peers, in turn and in one process. Never part of the tests."""
