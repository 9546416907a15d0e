"""``python -m bertkd``: the command line, also under ``accelerate launch -m bertkd``."""

import sys

from bertkd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
