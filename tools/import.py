#!/usr/bin/env python3
"""Take runs that others published into tables: `mdistill import`."""

import sys

from mdistill.cli.import_ import main

if __name__ == "__main__":
    sys.exit(main())
