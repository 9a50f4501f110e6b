#!/usr/bin/env python3
"""Search the settings of a table's rows on held-out training images: `mdistill tune`."""

import sys

from mdistill.cli.tune import main

if __name__ == "__main__":
    sys.exit(main())
