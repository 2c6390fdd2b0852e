"""``python -m train.mirror follow|work|sync``: see `train.mirror`."""

from __future__ import annotations

import sys
from pathlib import Path

from train.log import log_to


def main(arguments: list[str]) -> int:
    """Run one of the mirror's processes; the exit code."""
    log_to(sys.stdout)
    # Each process imports its own part only: a supervisor stays light, and W&B's client is slow to import.
    match arguments:
        case ["follow", pack_file]:
            from train.mirror.child import supervise

            return supervise(pack_file)
        case ["work", pack_file, trainer]:
            from train.mirror.worker import follow

            follow(Path(pack_file), int(trainer))
            return 0
        case ["sync"]:
            from train.mirror.upload import main as upload

            return upload()
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
