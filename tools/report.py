#!/usr/bin/env python3
"""Write a page about runs: `mdistill report`."""

import sys

from mdistill.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
