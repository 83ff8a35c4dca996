"""The data suite: does preparing a corpus take time in proportion to its size, and memory that does not grow?

Writes synthetic jsonl corpora to a temporary folder, prepares each with `scripts/prepare_data.py` in a process of its
own, and removes everything again. A process's resident set counts the pages of memory-mapped files, which the kernel
takes back when it likes; memory that cannot be taken back is the anonymous part, so both are reported.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from utils.artifacts import locks
from utils.exceptions import ArtefactError, Problem, VerificationError
from utils.logger import event

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"
MEGABYTE = 10**6
# an estimate: jsonl and its Arrow copy, then the text with int32 ids twice (written, published) at 1.1 tokens a byte,
# which is what a vocabulary of 768 gives; one of 49k gives 0.75, and 10
DISK_PER_BYTE = 13
VOCABULARY, SENTENCES = 20_000, 20_000
SECONDS_BETWEEN_SAMPLES = 0.1


@dataclass(frozen=True)
class Preparation:
    """What preparing one corpus took."""

    corpus_bytes: int
    documents: int
    seconds: float
    seconds_per_gb: float
    peak_memory_bytes: int
    """Largest resident set, pages of memory-mapped files included."""
    peak_anonymous_bytes: int
    """Largest resident set without them; 0 where the system does not say."""


def measure(config: Config) -> dict[str, Any]:
    """Prepare a synthetic corpus of each size of `benchmark.corpus_megabytes`, smallest first."""
    sizes = sorted(config.benchmark.corpus_megabytes)
    preparations = []
    with locks.scratch("corpora") as scratch:
        free = shutil.disk_usage(scratch).free
        if free < (needed := DISK_PER_BYTE * sizes[-1] * MEGABYTE):
            raise ArtefactError(
                Problem(
                    f"the data suite needs {needed / 1e9:.1f} GB under {scratch}, {free / 1e9:.1f} GB are free",
                    fix="set TMPDIR to a larger disk, or give smaller --benchmark.corpus_megabytes",
                )
            )
        for megabytes in sizes:
            corpus = scratch / f"{megabytes}mb.jsonl"
            documents = write_corpus(corpus, megabytes * MEGABYTE, seed=config.run.seed)
            done = _prepare(config, corpus, documents, scratch / "data")
            preparations.append(done)
            event(
                f"prepared {megabytes} MB",
                seconds=done.seconds,
                per_gb=done.seconds_per_gb,
                peak_mb=done.peak_memory_bytes // MEGABYTE,
                anonymous_mb=done.peak_anonymous_bytes // MEGABYTE,
            )
            corpus.unlink()
            shutil.rmtree(scratch / "data", ignore_errors=True)
    return {"preparations": [asdict(done) for done in preparations], **growth(preparations)}


def growth(preparations: list[Preparation]) -> dict[str, float]:
    """Exponent of time over size (1 is linear), and bytes of memory per further byte of text (0 is flat)."""
    if len(preparations) < 2:
        return {}
    sizes = np.array([done.corpus_bytes for done in preparations], dtype=float)
    seconds = np.array([done.seconds for done in preparations])
    anonymous = np.array([done.peak_anonymous_bytes for done in preparations], dtype=float)
    return {
        "time_exponent": round(float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]), 3),
        "anonymous_bytes_per_byte": round(float(np.polyfit(sizes, anonymous, 1)[0]), 4),
    }


def write_corpus(path: Path, size: int, seed: int) -> int:
    """Write distinct documents of about 3 kB, `size` bytes of jsonl in all; returns their number.

    Sentences are drawn from a pool of invented words, frequent ones often, as in real text: random letters would
    neither compress into tokens nor reuse the tokenizer's cache of words.
    """
    generator = random.Random(seed)
    letters = "eeeaaoiinnssttrrlldhcumpgbfywvkxzjq"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 10))) for _ in range(VOCABULARY)]
    weights = [1 / (rank + 10) for rank in range(VOCABULARY)]
    pool = generator.choices(words, weights, k=14 * SENTENCES)
    sentences = [" ".join(pool[at : at + 14]).capitalize() + "." for at in range(0, len(pool), 14)]
    written = documents = 0
    with path.open("w", encoding="utf-8") as handle:
        while written < size:
            text = " ".join(generator.choices(sentences, k=generator.randint(10, 60)))
            written += handle.write(json.dumps({"id": f"d{documents}", "text": text}) + "\n")
            documents += 1
    return documents


def _prepare(config: Config, corpus: Path, documents: int, data_dir: Path) -> Preparation:
    flags = {
        "--preset": config.preset,
        "--base.source": config.base.source,
        "--base.name": config.base.name,
        "--data.corpus": corpus,
        "--data.task": "none",
        "--data.max_documents": 0,
        "--run.data_dir": data_dir,
        "--run.models_dir": config.run.models_dir.absolute(),
    }
    command = [sys.executable, str(SCRIPT), *(str(part) for pair in flags.items() for part in pair)]
    # flags win over the environment, but a variable that names another corpus would still be checked with ours
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DTA_")}
    size = corpus.stat().st_size
    log = corpus.with_suffix(".log")
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        peak, anonymous = peak_memory(child)
    seconds = time.perf_counter() - began
    if child.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise VerificationError(Problem("prepare_data failed on the synthetic corpus", last))
    return Preparation(size, documents, round(seconds, 2), round(seconds / size * 1e9, 1), peak, anonymous)


def peak_memory(child: subprocess.Popen[bytes]) -> tuple[int, int]:
    """(peak resident, peak anonymous) bytes of a child and its own children together, until it ends.

    Sampled and not asked of `wait4`, whose maximum begins with the resident set of the process that forked.
    """
    import psutil

    peak = anonymous = 0
    process = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            memory = [one.memory_info() for one in (process, *process.children(recursive=True))]
        except psutil.NoSuchProcess:
            continue
        peak = max(peak, sum(one.rss for one in memory))
        anonymous = max(anonymous, sum(one.rss - one.shared if hasattr(one, "shared") else 0 for one in memory))
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    child.wait()
    return peak, anonymous
