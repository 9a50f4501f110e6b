#!/usr/bin/env python3
"""The main job on the embedded data set: `mdistill quickstart`."""

import sys

from mdistill.cli.quickstart import main

if __name__ == "__main__":
    sys.exit(main())
