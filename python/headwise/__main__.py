"""``python -m headwise``: the command line."""

import sys

from headwise.apps.cli import main

if __name__ == "__main__":
    sys.exit(main())
