"""The programs of others that read what we write, each in an environment below .venvs/ that `make interop-test` makes.

An environment holds the program's own packages before ours: torch is installed once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import unittest
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venvs"
# transformers 4 and what it needs of its own; the others resolve with our pins
PROGRAMS: dict[str, tuple[str, ...]] = {
    "transformers4": ("transformers==4.57.3",),
    "lm_eval": ("lm_eval==0.4.13",),
    "trl": ("trl==1.16.0",),
    "trackers": ("trackio==0.43.0", "wandb==0.22.3"),
    # its source has the converter of the llama.cpp that it is built from
    "llama_cpp": ("llama-cpp-python==0.3.36", "sentencepiece"),
}
WHEELS = ENVIRONMENTS / "wheels"


@dataclass(frozen=True)
class Program:
    """An environment's interpreter."""

    name: str
    python: Path

    def run(self, *arguments: object, given: str = "") -> str:
        """A program's standard output; AssertionError with its last words when it fails."""
        command = [str(self.python), *map(str, arguments)]
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            raise AssertionError(f"{self.name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        return done.stdout


def program(name: str) -> Program:
    """The program's environment. Raises SkipTest when it is not there."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        raise unittest.SkipTest(f"{name} is not installed in {ENVIRONMENTS.name}/{name}: make interop-test")
    return Program(name, python)


def install(name: str) -> None:
    """Make the environment unless it is complete. Raises CalledProcessError when pip cannot."""
    place, wanted = ENVIRONMENTS / name, PROGRAMS[name]
    WHEELS.mkdir(parents=True, exist_ok=True)
    ready = place / ".ready"
    if ready.exists() and ready.read_text() == " ".join(wanted):
        return
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    own = next(place.glob("lib/python*/site-packages"))
    (own / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if name == "llama_cpp":
        _llama_cpp(place, wanted[0])
    _pip(place, "install", "--find-links", str(WHEELS), *wanted)
    ready.write_text(" ".join(wanted))


def _llama_cpp(place: Path, wanted: str) -> None:
    """Build the wheel, which is kept, and unpack llama.cpp's converter from the source distribution."""
    _pip(place, "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(WHEELS), wanted)
    (source,) = WHEELS.glob("llama_cpp_python-*.tar.gz")
    if not list(WHEELS.glob("llama_cpp_python-*.whl")):
        _pip(place, "wheel", "--no-deps", "-w", str(WHEELS), str(source))
    with tarfile.open(source) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (converter,) = (place / "unpacked").glob("*/vendor/llama.cpp")
    converter.rename(place / "llama.cpp")
    shutil.rmtree(place / "unpacked")


def _pip(place: Path, *arguments: str) -> None:
    command = [str(place / "bin/python"), "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments[1:]], check=True, env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore"})
