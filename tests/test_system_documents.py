"""Every command in the README exists, parses and would run; the slow ones are run by test_system_integration and CI."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import unittest

from tests.support import ROOT, clean_environment, temporary_directory

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in FENCED
    for line in block.splitlines()
    if re.match(r"(make|python|accelerate|black|ruff|pre-commit) ", line)
]


class Readme(unittest.TestCase):
    def test_every_script_command_is_accepted(self) -> None:
        commands = [c for c in COMMANDS if "scripts/" in c]
        self.assertGreaterEqual(len(commands), 8)
        for command in commands:
            with self.subTest(command):
                words = shlex.split(command)
                script = next(i for i, word in enumerate(words) if word.startswith("scripts/") and word.endswith(".py"))
                if "--config_file" in words:
                    self.assertTrue((ROOT / words[words.index("--config_file") + 1]).is_file())
                done = subprocess.run(
                    [sys.executable, *words[script:], "--dry-run"],
                    cwd=ROOT,
                    env=clean_environment(),
                    capture_output=True,
                    text=True,
                    check=False,
                )
                self.assertEqual(done.returncode, 0, done.stderr)

    def test_every_script_of_the_project_is_in_the_readme(self) -> None:
        for script in sorted((ROOT / "scripts").glob("*.py")):
            self.assertIn(f"`{script.stem}`", README)

    def test_make_targets_exist(self) -> None:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
        self.assertGreaterEqual(set(targets), {"demo", "test"})
        for target in targets:
            self.assertRegex(makefile, rf"(?m)^{target}:")

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
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        subprocess.run([git, "init", "--quiet"], cwd=copy, check=True)
        subprocess.run([git, "add", "--all"], cwd=copy, check=True)
        done = subprocess.run(
            [sys.executable, "-m", "pre_commit", "run", "--all-files"],
            cwd=copy,
            env=clean_environment({"PRE_COMMIT_HOME": str(copy.parent / "pre-commit"), "PATH": _path()}),
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_promised_commands_are_all_there(self) -> None:
        promised = [
            "python scripts/prepare_data.py",
            "accelerate launch scripts/train_domain_adapter.py",
            "accelerate launch scripts/train_task_adapter.py",
            'python scripts/inference.py --prompt "Your prompt here"',
            'python scripts/inference.py --merge_path "models/merged_model"',
            "python scripts/evaluate.py",
            "python scripts/benchmark.py",
            "python -m unittest discover tests",
            "black . && ruff check --fix . && pre-commit run --all-files",
        ]
        for command in promised:
            self.assertTrue(any(c.startswith(command) for c in COMMANDS), command)


def _path() -> str:
    """PATH with this interpreter first: hooks say `python`."""
    import os

    return f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"


if __name__ == "__main__":
    unittest.main()
