"""``python -m launcher``."""

import os
import sys

from launcher.cli import main

os.umask(0o077)  # whatever this process writes, and its jobs too, its owner alone can read
sys.exit(main(sys.argv[1:]))
