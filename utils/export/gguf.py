"""A merged model as GGUF, made by llama.cpp's own converter, which is not part of this project.

The converter is looked for in the directory that LLAMA_CPP_DIR names (a checkout of llama.cpp), else on PATH. The
result is a sibling of the model's directory, `<directory>-<type>.gguf`; it appears under that name only when it was
checked, and nothing is ever overwritten.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from utils.artifacts.locks import small_file, sweep
from utils.exceptions import ArtefactError, Problem
from utils.logger import event
from utils.secrets import redact

CONVERTER = "convert_hf_to_gguf.py"
CHECKOUT = "LLAMA_CPP_DIR"
MAGIC = b"GGUF"
# q8_0 takes 8.5 bits a weight, the checkpoint 32 at most: 0.27 of its size, 0.269 measured on SmolLM2
SMALLEST_SHARE = 0.2
# the converter's other requirements are ours too; sentencepiece it tries first for every Llama
GET_IT = "git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install sentencepiece"


def check(directory: Path, out_type: str) -> None:
    """For before hours of work: raises ArtefactError when the target exists or LLAMA_CPP_DIR holds no converter."""
    find_converter()
    _refuse(target_for(directory, out_type))


def convert(directory: Path, out_type: str) -> Path | None:
    """Write the GGUF file of a merged model and return its path; None, with the command to run, without a converter.

    Raises ArtefactError when the target exists, the converter fails, or what it wrote is no GGUF file of this model.
    """
    target = target_for(directory, out_type)
    _refuse(target)
    run = command(directory, out_type, target)
    if find_converter() is None:
        event(f"no GGUF converter is installed; get it with: {GET_IT}; then run: {shlex.join(run)}")
        return None
    sweep(target.parent)
    # no part of the model's name: the converter fills in {placeholders} in a file name
    temporary = small_file(target, "gguf")
    event("converting to GGUF", type=out_type, target=target)
    try:
        _run(command(directory, out_type, temporary), run)
        _check_file(temporary, directory)
        _refuse(target)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    event("GGUF file written", path=target, bytes=target.stat().st_size)
    return target


def target_for(directory: Path, out_type: str) -> Path:
    """Where the GGUF file of a model directory goes."""
    directory = _absolute(directory)
    return directory.with_name(f"{directory.name}-{out_type}.gguf")


def find_converter() -> Path | None:
    """llama.cpp's converter, or None. Raises ArtefactError when LLAMA_CPP_DIR is set and does not hold it."""
    if checkout := os.environ.get(CHECKOUT):
        path = Path(checkout) / CONVERTER
        if path.is_file():
            return _absolute(path)
        raise ArtefactError(
            Problem(f"{CHECKOUT} holds no {CONVERTER}", checkout, f"point it at a checkout of llama.cpp: {GET_IT}")
        )
    on_path = shutil.which(CONVERTER)
    return _absolute(Path(on_path)) if on_path else None


def command(directory: Path, out_type: str, target: Path) -> list[str]:
    """What converts `directory`; without a converter, what would after getting llama.cpp into this directory."""
    converter = find_converter()
    if converter is None:
        run = ["python", f"llama.cpp/{CONVERTER}"]
    elif os.environ.get(CHECKOUT):
        run = [sys.executable, str(converter)]
    else:
        run = [str(converter)]  # an installed one brings its own interpreter, or is a wrapper
    return [*run, str(_absolute(directory)), "--outtype", out_type, "--outfile", str(target)]


def _absolute(path: Path) -> Path:
    """Without `.` and `..`, so that a name is there to derive from, and symbolic links as the user wrote them."""
    return Path(os.path.abspath(path))


def _refuse(target: Path) -> None:
    if os.path.lexists(target):
        raise ArtefactError(
            Problem("the GGUF file exists already; nothing is ever overwritten", str(target), "remove or rename it")
        )


def _run(run: list[str], by_hand: list[str]) -> None:
    try:
        done = subprocess.run(run, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        reason = error.strerror or str(error)
        fix = f"make {CONVERTER} executable, or set {CHECKOUT} to a checkout of llama.cpp"
        raise ArtefactError(Problem(f"the GGUF converter does not start: {reason}", run[0], fix)) from error
    if not done.returncode:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = redact(lines[-1]) if lines else f"exit code {done.returncode} and not a word on standard error"
    missing = re.search(r"No module named '([A-Za-z0-9_]+)", reason)
    fix = f"pip install {missing[1]}" if missing else "see what llama.cpp's converter supports"
    # the whole command would refuse the merged model that is already there
    raise ArtefactError(Problem(f"the GGUF converter failed: {reason}", fix=f"{fix}; then run: {shlex.join(by_hand)}"))


def _check_file(path: Path, directory: Path) -> None:
    """An exit code of 0 is no proof: look at the file."""
    fix = f"update llama.cpp and try again; the merged model in {directory} is not touched"
    if not path.is_file():
        raise ArtefactError(Problem("the GGUF converter reported success and wrote no file", fix=fix))
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        magic = handle.read(len(MAGIC))
    if magic != MAGIC:
        raise ArtefactError(Problem("the converter's file is no GGUF file: it starts otherwise", magic, fix))
    weights = sum(shard.stat().st_size for shard in directory.glob("*.safetensors"))
    size = path.stat().st_size
    if size < SMALLEST_SHARE * weights:
        raise ArtefactError(Problem(f"the GGUF file is too small for {weights} bytes of weights", size, fix))
