"""`python -m diffratio` is the command line."""

from __future__ import annotations

import sys

from diffratio.cli import main

if __name__ == "__main__":
    sys.exit(main())
