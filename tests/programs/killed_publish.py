"""Be killed while an artefact is half written: python -m tests.programs.killed_publish TARGET FINGERPRINT_OR_EMPTY."""

import os
import signal
import sys
from pathlib import Path

from utils.artifacts import files

with files.publish(Path(sys.argv[1]), dict, resume=sys.argv[2]) as directory:
    (directory / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
