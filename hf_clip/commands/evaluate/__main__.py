"""`python -m hf_clip.commands.evaluate TASK`, which `accelerate launch -m` runs too."""

import sys

from ..app import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
