"""`python -m znn` is the command `znn`."""

import sys

from znn.cli import main

if __name__ == "__main__":
    sys.exit(main())
