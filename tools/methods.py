#!/usr/bin/env python3
"""List the methods: `mdistill methods`."""

import sys

from mdistill.cli.methods import main

if __name__ == "__main__":
    sys.exit(main())
