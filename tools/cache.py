#!/usr/bin/env python3
"""Compute a teacher's logits ahead of training: `mdistill cache`."""

import sys

from mdistill.cli.cache import main

if __name__ == "__main__":
    sys.exit(main())
