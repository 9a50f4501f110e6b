#!/usr/bin/env python3
"""Draw a picture of runs: `mdistill plot`."""

import sys

from mdistill.cli.plot import main

if __name__ == "__main__":
    sys.exit(main())
