#!/usr/bin/env python3
"""Look through a folder of images, or make a smaller copy of it: `mdistill data`."""

import sys

from mdistill.cli.data import main

if __name__ == "__main__":
    sys.exit(main())
