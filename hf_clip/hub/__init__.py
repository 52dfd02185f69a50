"""From a folder to a repository on the Hub: what goes there, the code in it, and its card."""
