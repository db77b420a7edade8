"""The command `hvdkit`, also as `python -m hvdkit`: see `hvdkit.command`."""

import sys

from hvdkit.command.main import main

if __name__ == "__main__":
    sys.exit(main())
