"""`python -m hvdkit.native`: compiles hvdkit's C++ operations unless they are compiled, and loads them."""

import sys

from hvdkit import native
from hvdkit.errors import UsageError

if __name__ == "__main__":
    try:
        print(native.build())
        native.load()
    except UsageError as error:
        sys.exit(f"hvdkit.native: {error}")
