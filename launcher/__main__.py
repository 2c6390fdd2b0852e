"""``python -m launcher`` and the command ``lorapack``."""

import os
import sys

from launcher.installation import put_own_packages_first


def main() -> int:
    """Run the program on the words of the command line; the exit code."""
    put_own_packages_first()
    # Whatever this process and its jobs write, its owner alone can read.
    os.umask(0o077)
    from launcher.cli import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
