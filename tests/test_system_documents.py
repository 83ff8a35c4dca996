"""Every command, setting and link in README.md and docs/ is real; the slow ones are run by test_system_integration."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import launch_command_parser
from pydantic import BaseModel

import utils
from config import Config
from tests.support import ROOT, clean_environment, temporary_directory

README = ROOT / "README.md"
SETTINGS_FILE = "my.yaml"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# blocks that name another language, or `text` for pictures and trees, hold no commands
SHELL = ("", "sh", "bash", "console")
# the only words a command may begin with besides `python`, `accelerate`, `make`, `sh` and `source`
EXTERNAL = {
    "vllm": "a server that is not installed here",
    ".venvs/vllm/bin/python": "vLLM's own environment: run as printed by test_inference_vllm (make serving-test)",
    "lm_eval": "not installed here; test_evaluation_lm_eval builds the same tasks",
    "docker": "not installed here; test_system_docker runs the install steps of its file",
    "sbatch": "not installed here; test_planning_plan runs its file with stand-ins",
    "git": "another program; its words depend on somebody's repository",
    "apt-get": "another system's packages",
    "black": "run by test_pre_commit_passes_offline_on_the_files_of_the_project",
    "ruff": "run by test_pre_commit_passes_offline_on_the_files_of_the_project",
    "pre-commit": "run by test_pre_commit_passes_offline_on_the_files_of_the_project",
}
OURS = ("python", "accelerate", "make", "sh", "source")
PLACEHOLDER = "section.field"


class Commands(unittest.TestCase):
    def test_every_command_is_known_and_what_it_names_exists(self) -> None:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for page, words in commands():
            with self.subTest(page=page, command=shlex.join(words)):
                self.assertIn(words[0], (*OURS, *EXTERNAL), "no command that is checked here, or on its short list")
                if words[0] == "make":
                    self.assertRegex(makefile, rf"(?m)^{re.escape(words[1])}:", "no such target")
                elif words[0] == "sh":
                    self.assertTrue((ROOT / words[1]).is_file(), words[1])
                elif words[:2] == ["python", "-m"]:
                    self.assertIsNotNone(importlib.util.find_spec(words[2]), words[2])
                elif words[0] == "python":
                    self.assertTrue((ROOT / words[1]).is_file(), words[1])
                elif words[0] == "accelerate" and "--config_file" in words:
                    self.assertTrue((ROOT / words[words.index("--config_file") + 1]).is_file())

    def test_every_script_command_is_accepted(self) -> None:
        accepted = 0
        for page, words in commands():
            with self.subTest(page=page, command=shlex.join(words)):
                if script := script_of(words):
                    code, said = dry_run(*script)
                    self.assertEqual(code, 0, said)
                    accepted += 1
        self.assertGreaterEqual(accepted, 20)

    def test_a_script_as_a_process_of_its_own_accepts_its_first_command(self) -> None:
        first: dict[str, list[str]] = {}
        for _, words in commands():
            if script := script_of(words):
                first.setdefault(script[0], script[1:])
        for script, arguments in first.items():
            with self.subTest(script):
                done = subprocess.run(
                    [sys.executable, script, *arguments, "--dry-run"],
                    cwd=ROOT,
                    env=clean_environment(),
                    capture_output=True,
                    text=True,
                    check=False,
                )
                self.assertEqual(done.returncode, 0, done.stderr)

    def test_every_setting_that_is_named_exists(self) -> None:
        known = {*settings(Config), PLACEHOLDER}
        for page in PAGES:
            for name in re.findall(r"--([a-z_0-9]+\.[a-z_0-9.]*[a-z_0-9])", page.read_text(encoding="utf-8")):
                self.assertIn(name, known, page.name)

    def test_promised_commands_are_all_there(self) -> None:
        promised = [
            "make demo",
            "make test",
            "python scripts/prepare_data.py",
            "accelerate launch scripts/train_domain_adapter.py",
            "accelerate launch scripts/train_task_adapter.py",
            'python scripts/inference.py --prompt "Your prompt here"',
            'python scripts/inference.py --merge_path "models/merged_model"',
            "python scripts/evaluate.py",
            "python scripts/benchmark.py",
            "python -m unittest discover tests",
            "black .",
            "ruff check --fix .",
            "pre-commit run --all-files",
        ]
        found = [words for page, words in commands() if page == README.name]
        for command in promised:
            wanted = shlex.split(command)
            self.assertTrue(any(words[: len(wanted)] == wanted for words in found), command)

    def test_pre_commit_passes_offline_on_the_files_of_the_project(self) -> None:
        git = shutil.which("git")
        if git is None or not (ROOT / ".git").exists():
            self.skipTest("pre-commit needs git and a checkout, and this is none")
        copy = temporary_directory() / "checkout"
        listed = subprocess.run(
            [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        names = [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
        # `make test` has run black and ruff on all of them before
        some = [name for name in names if not name.endswith(".py") or re.fullmatch(r"(scripts/|utils/)?\w+\.py", name)]
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        subprocess.run([git, "init", "--quiet"], cwd=copy, check=True)
        subprocess.run([git, "add", "--all"], cwd=copy, check=True)
        done = subprocess.run(
            [sys.executable, "-m", "pre_commit", "run", "--files", *some],
            cwd=copy,
            env=clean_environment({"PRE_COMMIT_HOME": str(copy.parent / "pre-commit"), "PATH": _path()}),
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)


class Pages(unittest.TestCase):
    def test_every_script_of_the_project_is_in_the_readme(self) -> None:
        for script in sorted((ROOT / "scripts").glob("*.py")):
            self.assertIn(f"`{script.stem}`", README.read_text(encoding="utf-8"))

    def test_every_package_is_in_the_readmes_tree(self) -> None:
        tree = README.read_text(encoding="utf-8")
        for package in (name for row in utils.ROWS for name in row):
            self.assertRegex(tree, rf"(?m)^  {package}/ ")
        self.assertIn(f"  {', '.join(utils.PLUMBING)}\n", tree)

    def test_every_page_is_linked_from_the_readme(self) -> None:
        linked = set(links(README))
        for page in PAGES[1:]:
            self.assertIn(f"docs/{page.name}", linked)

    def test_every_relative_link_leads_somewhere(self) -> None:
        for page in PAGES:
            for link in links(page):
                path, _, anchor = link.partition("#")
                target = (page.parent / path).resolve() if path else page
                with self.subTest(page=page.name, link=link):
                    self.assertTrue(target.exists())
                    if anchor:
                        self.assertIn(anchor, anchors(target))


def commands() -> Iterator[tuple[str, list[str]]]:
    """Name of a page and words of a command, for every command in the pages' blocks and between backticks."""
    for page in PAGES:
        for line in page_commands(page.read_text(encoding="utf-8")):
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield page.name, words[:end]
                words = words[end + 1 :]


def page_commands(text: str) -> Iterator[str]:
    """The commands of a page, a line each: all lines of shell blocks, and code in a sentence that begins like one."""
    prose: list[str] = []
    language: str | None = None
    before = ""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            language = line[3:].strip() if language is None else None
        elif language is not None:
            if language in SHELL and line.strip():
                yield line.strip()
        elif line.startswith("    ") and (not before or before.startswith("    ")):
            yield line.strip()
        else:
            prose.append(line)
        before = line
    for code in re.findall(r"`([^`]+)`", "\n".join(prose)):
        words = code.split()
        if len(words) > 1 and words[0] in (*OURS, *EXTERNAL) and words != ["accelerate", "launch"]:
            yield " ".join(words)


def script_of(words: list[str]) -> list[str]:
    """Script and its arguments, of `python scripts/x.py` and `accelerate launch ... scripts/x.py`; else nothing."""
    if ">" in words:
        words = words[: words.index(">")]
    words = [settings_file() if word == SETTINGS_FILE else word for word in words]
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        return [launch.training_script, *launch.training_script_args]
    return words[1:] if words[0] == "python" and words[1].startswith("scripts/") else []


@functools.cache
def settings_file() -> str:
    """The file of settings that docs/settings.md prints."""
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    path = temporary_directory() / SETTINGS_FILE
    path.write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    return str(path)


@functools.cache
def dry_run(script: str, *arguments: str) -> tuple[int, str]:
    """Exit code of `python SCRIPT ARGUMENTS --dry-run` and what it printed; run here, an interpreter takes seconds."""
    said, code = io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [script, *arguments, "--dry-run"]),
        mock.patch.object(sys, "path", list(sys.path)),
        mock.patch.dict(os.environ, clean_environment(), clear=True),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    return code, said.getvalue()


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """`task.lora.rank`, `task.lora` ... of every setting and section."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")


def links(page: Path) -> list[str]:
    """Targets of a page's links that are not addresses."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """What `#...` may say of a page: its headings as GitHub writes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def _path() -> str:
    """PATH with this interpreter first: hooks say `python`."""
    return f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"


if __name__ == "__main__":
    unittest.main()
