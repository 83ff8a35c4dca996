"""Runs a file as if it were typed at the project's root."""

import runpy
import sys

runpy.run_path(sys.argv[1], run_name="__main__")
