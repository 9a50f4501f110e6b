#!/usr/bin/env python3
"""Replay the first steps of a run and compare: `mdistill audit`."""

import sys

from mdistill.cli.audit import main

if __name__ == "__main__":
    sys.exit(main())
