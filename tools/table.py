#!/usr/bin/env python3
"""Train what the table of a paper is missing, and show it: `mdistill table`."""

import sys

from mdistill.cli.table import main

if __name__ == "__main__":
    sys.exit(main())
