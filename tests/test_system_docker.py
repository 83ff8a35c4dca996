"""The images' recipe: it fits the project, and its install steps work in an empty environment (DOCKER_STEPS=1)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import unittest
from fnmatch import fnmatch
from pathlib import Path

from tests.support import ROOT, temporary_directory
from utils import flags

RECIPE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
TARGETS = ("cpu", "cuda")
# what an environment of Python's own cannot do: the machine's packages
NOT_HERE = "apt-get"


def stages(recipe: str) -> dict[str, list[tuple[str, str]]]:
    """Stage -> (instruction, rest), those of the stage it is built from first."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in recipe.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if not word or word.startswith("#"):
            continue
        if word == "FROM":
            below, _, name = rest.partition(" AS ")
            found[name] = [*found.get(below, [("FROM", below)])]
        else:
            found[name].append((word, rest.strip()))
    return found


class Recipe(unittest.TestCase):
    def test_both_targets_install_everything_and_copy_the_project_last(self) -> None:
        found = stages(RECIPE)
        for target in TARGETS:
            steps = found[target]
            self.assertEqual(steps[0], ("FROM", f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"))
            self.assertIn(("RUN", "pip install -r requirements.txt"), steps)
            self.assertEqual(steps[-1], ("COPY", ". ."))
            self.assertLessEqual({word for word, _ in steps}, {"FROM", "ENV", "WORKDIR", "COPY", "RUN"})
            self.assertNotIn("TOKEN", " ".join(rest for _, rest in steps))

    def test_torch_is_the_one_of_the_requirements(self) -> None:
        (wanted,) = re.findall(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
        self.assertEqual(re.findall(r"torch==[^\s]+", RECIPE), [wanted])

    def test_data_models_and_history_stay_outside(self) -> None:
        left_out = [line for line in (ROOT / ".dockerignore").read_text().split() if not line.startswith("!")]
        for path in (".git", ".venv", "data/prepared", "models/domain"):
            self.assertTrue(any(fnmatch(path, pattern) for pattern in left_out), path)
        for path in ("scripts", "utils", "config.py", "requirements.txt", "data/README.md"):
            kept = path in (ROOT / ".dockerignore").read_text() or not any(fnmatch(path, p) for p in left_out)
            self.assertTrue(kept, path)

    def test_the_page_says_what_was_not_done_and_builds_what_is_there(self) -> None:
        page = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
        self.assertIn("have not been built", page)
        self.assertEqual(set(re.findall(r"--target (\w+)", page)), set(TARGETS))


class Slurm(unittest.TestCase):
    def test_every_line_that_the_page_explains_is_in_the_file(self) -> None:
        page = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
        script = (ROOT / "scripts/launch/minimax_m2.slurm").read_text(encoding="utf-8")
        table = page[page.index("| line |") :]
        explained = re.findall(
            r"`([^`]+)`", " ".join(line.split("|")[1] for line in table.splitlines()[2:] if "|" in line)
        )
        self.assertGreater(len(explained), 8)
        for one in explained:
            self.assertIn(one.removesuffix("..."), script)


class OtherTools(unittest.TestCase):
    def test_every_flag_and_script_of_the_page_is_there(self) -> None:
        page = (ROOT / "docs/from_other_tools.md").read_text(encoding="utf-8")
        ours = [
            line.split("|")[-2] for line in page.splitlines() if line.startswith("| ") and not line.startswith("| wish")
        ]
        known = {*flags.fields(), *flags.SHORTCUTS.values()}
        named = re.findall(r"--([a-z_]+(?:\.[a-z_]+)*)", " ".join(ours))
        self.assertGreater(len(named), 20)
        for one in named:
            self.assertTrue(one in known or one in ("config", "print", "config_file"), one)
        for script in re.findall(r"(\w+)\.py", " ".join(ours)):
            self.assertTrue((ROOT / "scripts" / f"{script}.py").exists(), script)
        for tool in ("LLaMA-Factory", "Axolotl", "TRL", "PEFT", "Unsloth"):
            self.assertIn(tool, page)


@unittest.skipUnless(os.environ.get("DOCKER_STEPS"), "installs several GB: DOCKER_STEPS=1")
class Steps(unittest.TestCase):
    """The pip steps of each target, in its order, in an environment that has nothing; then a script of the copy."""

    def test_install_steps(self) -> None:
        for target in TARGETS:
            with self.subTest(target):
                self.run_steps(stages(RECIPE)[target], temporary_directory())

    def run_steps(self, steps: list[tuple[str, str]], root: Path) -> None:
        app = root / "app"
        app.mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(root / "venv")], check=True)
        kept = {name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "HTTP", "http", "SSL"))}
        environment = {"PATH": f"{root / 'venv' / 'bin'}:/usr/bin:/bin", "HOME": str(root), **kept}
        for word, rest in steps:
            if word == "ENV":
                environment |= dict(pair.split("=", 1) for pair in rest.split())
            elif word == "COPY" and rest == ". .":
                skipped = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.egg-info")
                shutil.copytree(ROOT, app, ignore=skipped, dirs_exist_ok=True)
            elif word == "COPY":
                shutil.copy(ROOT / rest.split()[0], app)
            elif word == "RUN" and not rest.startswith(NOT_HERE):
                done = subprocess.run(rest, shell=True, cwd=app, env=environment, capture_output=True, text=True)
                if "--index-url" in rest and done.returncode and "pytorch.org" in rest:
                    self.skipTest(f"another index cannot be reached here: {done.stderr.strip().splitlines()[-1]}")
                self.assertEqual(done.returncode, 0, f"{rest}\n{done.stderr[-2000:]}")
        flags_of_toy = "--preset tiny_minimax_m2 --run.data_dir /tmp/none --dry-run"
        script = (
            f"python scripts/train_domain_adapter.py {flags_of_toy} && python -c 'import torch, transformers, peft'"
        )
        done = subprocess.run(script, shell=True, cwd=app, env=environment, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])


if __name__ == "__main__":
    unittest.main()
