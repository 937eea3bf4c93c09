"""`python -m tinylab …` is `tinylab …`."""

import sys

from tinylab.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
