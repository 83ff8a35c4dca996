"""Preparation of one checkout beside another: seconds, memory and counts of `prepare_data`, in interleaved runs.

Other programs of the machine slow both alike, so what is compared is the ratio of two runs that follow each other; the
median of the pairs is printed. Sizes grow by a factor where a size is given: synthetic jsonl of so many megabytes.

    python -m tests.programs.compare_preparation OTHER_CHECKOUT REPEATS FOLDER_OR_MEGABYTES...
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support import ROOT
from utils.benchmarks.suite_data import write_corpus


def main(other: Path, repeats: int, wanted: list[str]) -> None:
    """Prepare each source with both checkouts in turn and print what it took and what was counted."""
    with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
        for checkout in (ROOT, other):
            prepared(checkout, ROOT / "README.md", Path(scratch))  # builds the model, which is not measured
        for name in wanted:
            source = Path(name)
            if name.isdigit():
                source = Path(scratch) / f"{name}mb.jsonl"
                write_corpus(source, int(name) * 10**6, seed=0)
            ratios, processors = [], []
            for _ in range(repeats):
                ours = prepared(ROOT, source, Path(scratch))
                theirs = prepared(other, source, Path(scratch))
                ratios.append(theirs["seconds"] / ours["seconds"])
                processors.append(theirs["processor_seconds"] / ours["processor_seconds"])
                for label, found in (("ours", ours), ("other", theirs)):
                    print(f"{name:<40} {label:<6} {json.dumps(found)}", flush=True)
            print(
                f"{name:<40} the other takes {statistics.median(ratios):.2f} times as long"
                f" ({', '.join(f'{ratio:.2f}' for ratio in ratios)}), {statistics.median(processors):.2f} times the"
                " processor time",
                flush=True,
            )


def prepared(checkout: Path, source: Path, scratch: Path) -> dict[str, Any]:
    """Seconds by the clock and of processors, and the counts, of one preparation from nothing."""
    data = scratch / "data"
    flags = ["--preset", "tiny_minimax_m2", "--data.corpus", str(source), "--data.task", "none"]
    # models of the checkout itself: what is built there once is not measured again
    flags += ["--data.max_documents", "0", "--run.data_dir", str(data), "--run.models_dir", str(scratch / "models")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(
        [
            str(own) if (own := checkout / ".venv" / "bin" / "python").exists() else sys.executable,
            str(checkout / "scripts" / "prepare_data.py"),
            *flags,
        ],
        cwd=checkout,
        env={name: value for name, value in os.environ.items() if not name.startswith(("DTA_", "PYTHONPATH"))},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(data, ignore_errors=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    counts = json.loads(done.stdout.strip().splitlines()[-1])["documents"]
    kept = {name: part["documents"] for name, part in counts.items() if isinstance(part, dict) and "documents" in part}
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 1), "processor_seconds": round(used, 1), **kept}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
