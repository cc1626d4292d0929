#!/usr/bin/env python
"""Start pre-training on several hosts: ``python launch/run.py launch/cluster.ini --launcher pdsh``."""

import sys

from lorapre_dist.launcher.app import main

if __name__ == "__main__":
    sys.exit(main())
