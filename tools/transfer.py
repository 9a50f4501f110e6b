#!/usr/bin/env python3
"""Try a student's features on other data: `mdistill transfer`."""

import sys

from mdistill.cli.transfer import main

if __name__ == "__main__":
    sys.exit(main())
