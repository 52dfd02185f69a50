"""Other libraries' layouts of the same models: read where they lie, and written."""
