"""`hf-clip convert` from a checkout: python -m conversion.convert …"""

import sys
from collections.abc import Sequence

from hf_clip.commands import program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    return program.main(["convert", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
