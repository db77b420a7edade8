"""`python -m hvdkit.native`: compiles what is to be compiled, unless it is there, and loads it."""

import sys

from hvdkit import native
from hvdkit.errors import UsageError

if __name__ == "__main__":
    try:
        print(native.build())
        native.load()
    except UsageError as error:
        sys.exit(f"hvdkit.native: {error}")
