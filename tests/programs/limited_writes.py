"""Write below a directory where no file may grow beyond 4096 bytes; what is said of it is printed.

python -m tests.programs.limited_writes DIRECTORY text|artefact...
"""

import resource
import signal
import sys
from pathlib import Path

from utils.artifacts import files
from utils.exceptions import ArtefactError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
root = Path(sys.argv[1])
for kind in sys.argv[2:]:
    try:
        if kind == "text":
            files.write_text(root / "kept.txt", "new" * 4096)
        else:
            with files.publish(root / "artefact", dict) as directory:
                (directory / "weights").write_bytes(b"x" * 8192)
    except ArtefactError as error:
        print(error)
