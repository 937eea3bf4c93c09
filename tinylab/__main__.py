"""`python -m tinylab …` is `tinylab …`."""

from __future__ import annotations

import sys

from tinylab.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
