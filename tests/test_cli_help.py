"""Help: one page for a start, every setting on demand with its choices and type, and no noise where output is cut."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import unittest
from typing import Any

from config import TrainSection
from tests.support import ROOT, clean_environment, run_script
from utils import flags
from utils.cli import help_text
from utils.exceptions import ConfigError

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
# a run whose reader has gone: much output, little output, an error
LATE_READER = """
import sys
sys.path.insert(0, {root!r})
from utils import cli
def main(config):
    print("x" * {size})
    return {{}}
cli.run(main, lambda config: [], sections=("run",), description="", argv={argv!r})
"""


def unfolded(*topics: str) -> str:
    return help_text.page("A script.", ("compose", "run"), (), topics)


class Page(unittest.TestCase):
    def test_every_setting_is_there_with_its_choices_or_type_its_default_and_its_meaning(self) -> None:
        every = unfolded("all")
        for path, field in flags.fields().items():
            heads = re.findall(rf"(?m)^  --{re.escape(path)}[ ,].*(?:\n          .*)*", every)
            self.assertEqual(len(heads), 1, path)
            self.assertIn("[default:", heads[0])
            self.assertIn(" ".join((field.description or "").split()), " ".join(every.split()))
        for part in (
            "--base.dtype auto|float32|bfloat16 [default: auto]",
            "--compose.weights, --weights NUMBER,... [default: (open)]",
            "--compose.search_methods sum|depth_gate|per_layer, ... [default: sum,depth_gate]",
            "--compose.rank INTEGER >= 0 [default: (open)]",
            "--benchmark.batch_sizes INTEGER,... >= 1 [default: 1,4]",
            "--run.models_dir PATH [default: models]",
            "--compose.search true|false [default: false]",
        ):
            self.assertIn(part, " ".join(every.split()))

    def test_text_of_several_lines_keeps_its_indentation(self) -> None:
        lines = unfolded("all").splitlines()
        flush = [line for line in lines if not line.startswith(" ")]
        self.assertEqual([line.partition(":")[0] for line in flush], list(help_text._sections()))
        for line in lines:
            self.assertLessEqual(len(line), 110)

    def test_a_section_a_part_of_one_and_a_setting_can_be_asked_for(self) -> None:
        self.assertEqual(len(re.findall(r"(?m)^  --", unfolded("task.lora"))), 6)
        self.assertEqual(
            len(re.findall(r"(?m)^  --task\.train\.", unfolded("task.train"))), len(TrainSection.model_fields)
        )
        self.assertNotIn("--task.lora", unfolded("task.train"))
        self.assertIn("--weights NUMBER", unfolded("weights"))
        self.assertNotIn("--run.seed", unfolded("compose"))
        with self.assertRaisesRegex(ConfigError, "did you mean compose"):
            unfolded("compos")

    def test_topics_are_the_words_after_help(self) -> None:
        self.assertIsNone(help_text.topics(["--prompt", "x"]))
        self.assertEqual(help_text.topics(["--prompt", "x", "--help", "--dry-run"]), [])
        self.assertEqual(help_text.topics(["-h", "compose", "run", "--seed", "3"]), ["compose", "run"])

    def test_the_first_page_of_every_script_is_one_page_with_settings_that_exist(self) -> None:
        for script in SCRIPTS:
            with self.subTest(script):
                tree = ast.parse((ROOT / "scripts" / f"{script}.py").read_text())
                named: dict[str, Any] = {
                    target.id: ast.literal_eval(node.value)
                    for node in tree.body
                    if isinstance(node, ast.Assign)
                    for target in node.targets
                    if isinstance(target, ast.Name) and target.id in ("SECTIONS", "MOST_USED")
                }
                self.assertLessEqual(set(named["MOST_USED"]), set(flags.fields()))
                page = help_text.page(ast.get_docstring(tree) or "", named["SECTIONS"], named["MOST_USED"], ())
                self.assertLess(len(page.splitlines()), 60)
                for word in (*named["SECTIONS"], *(f"--{path}" for path in named["MOST_USED"]), "--help SECTION"):
                    self.assertIn(word, page)

    def test_a_script_shows_it(self) -> None:
        shown = run_script("train_task_adapter", "--help", "task").stdout
        self.assertIn("--task.lora.rank INTEGER >= 1  [default: 16]\n      Rank r of the update B A; raise it", shown)
        self.assertNotIn("--base.dtype", run_script("train_task_adapter", "--help").stdout)


class ClosedStreams(unittest.TestCase):
    def test_a_script_whose_streams_the_shell_closed_does_its_work(self) -> None:
        command = f"exec {sys.executable} {ROOT / 'scripts' / 'prepare_data.py'} --preset tiny_minimax_m2 --dry-run"
        for closed in (">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"):
            with self.subTest(closed):
                done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, check=False)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual("dry_run" in done.stdout, ">&-" not in closed.replace("2>&-", ""))


class FirstLine(unittest.TestCase):
    def test_a_script_that_loads_a_model_says_run_and_settings_before_it_imports_torch(self) -> None:
        argv = ["--run.name", "mine", "--prompt", "none of your business", "--task.system_prompt", "word " * 40]
        program = LATE_READER.format(root=str(ROOT), size=0, argv=argv)
        program = program.replace('sections=("run",)', 'sections=("base", "run")')
        program = program.replace('print("x" * 0)', "sys.stderr.write(f\"torch: {'torch' in sys.modules}\")")
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=clean_environment()
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        first, after = done.stderr.splitlines()
        self.assertRegex(
            first, r"preset smollm2_135m, base model wheel:\S+ \(default; see --base.source\), run mine  run.name=mine"
        )
        self.assertNotIn("business", first)
        self.assertLess(len(first), 300)
        self.assertEqual(after, "torch: False")


class ReaderGone(unittest.TestCase):
    def cut(self, size: int, *argv: str) -> tuple[int, str]:
        """Exit code and standard error of a program whose standard output nobody reads."""
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing) as nobody:
            done = subprocess.run(
                [sys.executable, "-c", LATE_READER.format(root=str(ROOT), size=size, argv=list(argv))],
                stdout=nobody,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                env=clean_environment(),
            )
        return done.returncode, done.stderr

    def test_help_and_runs_end_quietly(self) -> None:
        for size, argv in ((0, ["--help"]), (0, ["--help", "all"]), (3, []), (1_000_000, []), (0, ["--dry-run"])):
            with self.subTest(size, argv=argv):
                self.assertEqual(self.cut(size, *argv), (141, ""))

    def test_an_error_is_told_where_only_the_result_has_no_reader(self) -> None:
        code, said = self.cut(0, "--run.seed", "x")
        self.assertEqual(code, 2)
        self.assertIn("--run.seed", said)

    def test_a_pipe_that_breaks_elsewhere_is_an_error(self) -> None:
        program = LATE_READER.format(root=str(ROOT), size=0, argv=[])
        program = program.replace('print("x" * 0)', "raise BrokenPipeError(32, 'Broken pipe')")
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertIn("Broken pipe", done.stderr)


if __name__ == "__main__":
    unittest.main()
