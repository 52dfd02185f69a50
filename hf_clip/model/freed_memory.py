"""Give memory back to the system that the process has freed and its allocator keeps.

To read a tokenizer.json takes millions of small blocks of memory, which are freed at once. glibc keeps such blocks for
later. Of OpenAI's tokenizer that is twice as much memory as the tokenizer itself takes.
"""

import ctypes


def return_freed_memory() -> None:
    """Ask glibc to return freed memory to the system. With another allocator nothing happens."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # no glibc, or Windows
        return


__all__ = ["return_freed_memory"]
