"""Hold the lock of the directory that is the argument, for a minute: python -m tests.programs.hold_lock DIRECTORY."""

import sys
import time
from pathlib import Path

from utils.artifacts import files

with files.locked(Path(sys.argv[1]), "the run"):
    print("held", flush=True)
    time.sleep(60)
