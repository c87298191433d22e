"""``python -m bpfx`` is the same as the ``bpfx`` command."""

import sys

from bpfx.cli import main

if __name__ == "__main__":
    sys.exit(main())
