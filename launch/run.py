#!/usr/bin/env python
"""``lorapre launch``: ``python launch/run.py launch/cluster.ini --launcher pdsh`` starts training on several hosts."""

import sys

from lorapre_dist.launcher.app import main

if __name__ == "__main__":
    sys.exit(main())
