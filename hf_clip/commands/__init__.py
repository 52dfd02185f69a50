"""The program `hf-clip`: one file a command, with its arguments and what it prints."""
