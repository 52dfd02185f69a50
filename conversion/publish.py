"""`hf-clip publish` from a checkout: python -m conversion.publish …"""

import sys
from collections.abc import Sequence

from hf_clip.commands import program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    return program.main(["publish", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
