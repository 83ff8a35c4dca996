"""A process that reads one file after the other under limits of time and memory, and answers over a pipe.

Started by `pool` as `python -m utils.data.extraction.worker FD SECONDS BYTES`; a request is a path, an answer is JSON.
A file that takes more processor time ends the process (SIGXCPU); one that takes more memory is answered as such.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from utils.data.extraction.extracted import Extracted, NoTextError
from utils.data.extraction.formats import read_file

# libraries leak a little with every file
FILES_PER_PROCESS = 500
MEMORY, CRASH = "needs too much memory", "its reader failed"
_OUT_OF_MEMORY = {
    "kind": MEMORY,
    "reason": "reading it takes more memory than one file is given",
    "fix": "raise --data.file_memory_mb, or take it out of the sources",
}


def serve(connection: Connection, seconds: float, memory_bytes: int) -> None:
    """Answer requests until the other end closes the pipe."""
    warnings.simplefilter("ignore")
    _limit_memory(memory_bytes)
    for number in range(1, FILES_PER_PROCESS + 1):
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            return
        _limit_time(seconds)
        reply = answer(os.fsdecode(request))
        # what a library held when its memory ran out is nobody's any more
        is_last = number == FILES_PER_PROCESS or reply.get("kind") == MEMORY
        try:
            content = json.dumps(reply | {"is_last": is_last}).encode()
        except MemoryError:
            is_last, content = True, json.dumps(_OUT_OF_MEMORY | {"is_last": True}).encode()
        with contextlib.suppress(OSError):
            connection.send_bytes(content)
        if is_last:
            return


def answer(path: str) -> dict[str, Any]:
    """What is read from a file: {"extracted": ...} or {"kind", "reason", "place", "fix"}."""
    try:
        return {"extracted": vars(read_file(Path(path)))}
    except NoTextError as error:
        return {"kind": error.kind, "reason": str(error), "place": error.place, "fix": error.fix}
    except ImportError as error:
        return {"kind": "import", "reason": str(error)}
    except OSError as error:
        return {"kind": "os", "reason": error.strerror or str(error)}
    except MemoryError:
        return dict(_OUT_OF_MEMORY)
    except Exception as error:  # noqa: BLE001 - whatever a file does to its reader, the next one is read
        return {"kind": CRASH, "reason": f"its reader failed ({type(error).__name__}: {error})"}


def read_answer(reply: dict[str, Any]) -> Extracted:
    """What an answer holds, at the other end of the pipe. Raises NoTextError, ImportError or OSError as `read_file`."""
    if "extracted" in reply:
        values = dict(reply["extracted"])
        documents = [(str(name), str(text)) for name, text in values.pop("documents")]
        removed, cleaned = Counter(values.pop("removed")), Counter(values.pop("cleaned"))
        return Extracted(documents, removed=removed, cleaned=cleaned, **values)
    if reply["kind"] == "import":
        raise ImportError(reply["reason"])
    if reply["kind"] == "os":
        raise OSError(None, reply["reason"])
    raise NoTextError(reply["reason"], kind=reply["kind"], place=reply.get("place", ""), fix=reply.get("fix", ""))


def _limit_memory(size: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _limit_time(seconds: float) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), float(sys.argv[2]), int(sys.argv[3]))
