"""``python -m lorapre_dist``: the command ``lorapre``."""

import sys

from lorapre_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
