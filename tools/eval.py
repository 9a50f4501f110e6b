#!/usr/bin/env python3
"""Evaluate a trained network: `mdistill eval`."""

import sys

from mdistill.cli.eval import main

if __name__ == "__main__":
    sys.exit(main())
