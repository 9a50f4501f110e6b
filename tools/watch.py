#!/usr/bin/env python3
"""Follow running work on a local page: `mdistill watch`."""

import sys

from mdistill.cli.watch import main

if __name__ == "__main__":
    sys.exit(main())
