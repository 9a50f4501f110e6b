#!/usr/bin/env python3
"""Train a student from a teacher, or a network alone: `mdistill train`."""

import sys

from mdistill.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
