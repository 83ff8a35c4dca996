"""Run what others' programs do with our artefacts, each in its environment below .venvs/, and say what ran.

    python -m tests.programs.interop [NAME...]     make interop-test

Prints program, version and result. Exit code 1 when a test fails, or when one that has to run was skipped.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.interop_support import ENVIRONMENTS, PROGRAMS, ROOT, install


@dataclass(frozen=True)
class Interop:
    """A program: the distribution whose version is told, its environment (none: ours), the tests, who runs them."""

    distribution: str
    environment: str
    tests: tuple[str, ...]
    runs_there: bool = False


TENSORBOARD = "test_training_trackers.Trackers.test_tensorboard_shows_the_curve_and_the_settings"
ALL = {
    "transformers 4": Interop("transformers", "transformers4", ("test_interop_transformers_4",)),
    "llama.cpp": Interop("llama-cpp-python", "llama_cpp", ("test_interop_llama_cpp",)),
    "lm-evaluation-harness": Interop("lm_eval", "lm_eval", ("test_evaluation_references.Harness",), runs_there=True),
    "TRL": Interop("trl", "trl", ("test_adapters_other_tools.Read.test_trl_adapter",), runs_there=True),
    "openai": Interop("openai", "", ("test_rollout_faults.PlainClients",)),
    "TensorBoard": Interop("tensorboard", "", (TENSORBOARD,)),
    "W&B, Trackio": Interop("wandb", "trackers", ("test_training_trackers",), runs_there=True),
}


def main(names: list[str]) -> int:
    """Install, run, tell."""
    failed = []
    for name, one in ALL.items():
        if names and name not in names:
            continue
        said = result(one)
        print(f"{name:<24} {version(one):<12} {said}", flush=True)
        if said != "ran":
            failed.append(name)
    return 1 if failed else 0


def result(one: Interop) -> str:
    """ran, or why not."""
    if one.environment:
        try:
            install(one.environment)
        except subprocess.CalledProcessError:
            return f"not installed: pip could not install {' '.join(PROGRAMS[one.environment])}"
    python = str(ENVIRONMENTS / one.environment / "bin/python") if one.runs_there else sys.executable
    command = [python, "-W", "ignore", "-m", "unittest", *(f"tests.{test}" for test in one.tests)]
    asked = {**os.environ, "ROLLOUT_PROCESS_TESTS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=asked)
    if done.returncode:
        return f"FAILED\n{done.stderr[-3000:]}"
    skipped = re.search(r"skipped=(\d+)", done.stderr)
    return f"{skipped[1]} skipped" if skipped else "ran"


def version(one: Interop) -> str:
    """Of the distribution where it is installed."""
    if not one.environment:
        return importlib.metadata.version(one.distribution)
    places = [str(path) for path in Path(ENVIRONMENTS / one.environment).glob("lib/python*/site-packages")]
    found = importlib.metadata.distributions(name=one.distribution, path=places)
    return next((each.version for each in found), "absent")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
