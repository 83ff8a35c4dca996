"""Settings: flag over environment over preset, every problem at once as it was typed, and answers without torch."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import unittest
from pathlib import Path

from config import PRESETS, BaseModelSection, Config, run_label
from tests.support import ROOT, clean_environment, run_script
from utils import cli, flags
from utils.exceptions import ConfigError

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")
# runs one script's command line several times in one interpreter, and fails if that brings in torch


def resolve(*arguments: str, **environment: str) -> Config:
    return cli.resolve(arguments, environment)


class Precedence(unittest.TestCase):
    def test_flag_wins_over_environment_and_environment_over_preset(self) -> None:
        preset = PRESETS["tiny_minimax_m2"]()
        environment = {"DTA_TASK__LORA__RANK": "7", "DTA_TASK__LORA__ALPHA": "9", "DTA_PRESET": "tiny_minimax_m2"}
        found = resolve("--task.lora.rank", "5", **environment)
        self.assertEqual((found.task.lora.rank, found.task.lora.alpha), (5, 9.0))
        self.assertEqual(found.task.lora.dropout, preset.task.lora.dropout)
        self.assertEqual(found.domain, preset.domain)
        self.assertEqual(found.overrides, {"task.lora.rank": "flag", "task.lora.alpha": "environment"})
        self.assertEqual(resolve("--preset", "minimax_m2", **environment).preset, "minimax_m2")

    def test_without_overrides_the_configuration_is_the_preset(self) -> None:
        for name, preset in PRESETS.items():
            if preset().base.source:
                self.assertEqual(resolve(f"--preset={name}"), preset())

    def test_last_of_two_equal_flags_wins(self) -> None:
        self.assertEqual(resolve("--run.seed", "3", "--run.seed=4").run.seed, 4)

    def test_a_switch_may_stand_before_the_names(self) -> None:
        last = cli.words_as_flags(["rm", "a", "b", "--yes"], "runs.command", "runs.names")
        self.assertEqual(cli.words_as_flags(["rm", "--yes", "a", "b"], "runs.command", "runs.names"), last)
        self.assertEqual(
            cli.words_as_flags(["prune", "--yes", "true"], "runs.command"), ["--runs.command", "prune", "--yes", "true"]
        )
        refused = ["rm", "a", "--yes", "false"]
        words = cli.words_as_flags(refused, "runs.command", "runs.names")
        self.assertEqual(words, ["--runs.command", "rm", "--runs.names", "a", "--yes", "false"])
        self.assertFalse(cli.resolve(words, {}).runs.yes)

    def test_settings_are_given_on_as_they_are_typed(self) -> None:
        typed = [
            "--data.corpus",
            '"a, b.txt",my texts',
            "--domain.lora.target_modules",
            "q_proj,v_proj",
            "--data.task=none",
        ]
        config = cli.resolve(typed, {})
        self.assertEqual(config.data.corpus, ("a, b.txt", "my texts"))
        words = flags.arguments(config, ("data", "domain"))
        self.assertIn("--domain.lora.target_modules=q_proj,v_proj", words)
        self.assertEqual(cli.resolve(words, {}).data.corpus, config.data.corpus)

    def test_short_and_long_spelling_are_one_setting(self) -> None:
        for short, long in (("--prompt", "--inference.prompt"), ("--weights", "--compose.weights")):
            value = "1,0.5" if "weights" in short else "Why?"
            self.assertEqual(resolve(short, value).model_dump(), resolve(long, value).model_dump())

    def test_lists_may_be_written_in_three_ways(self) -> None:
        for written in (["q_proj,v_proj"], ["q_proj", "v_proj"], ['["q_proj", "v_proj"]']):
            found = resolve("--task.lora.target_modules", *written)
            self.assertEqual(found.task.lora.target_modules, ("q_proj", "v_proj"))
        for written in (["1,-0.5"], ["1", "-0.5"], ["[1, -0.5]"]):
            self.assertEqual(resolve("--weights", *written).compose.weights, (1.0, -0.5))
        self.assertEqual(resolve(DTA_COMPOSE__WEIGHTS="1,-0.5").compose.weights, (1.0, -0.5))
        self.assertEqual(resolve("--run.trackers=").run.trackers, ())

    def test_a_prompt_is_taken_as_it_is_written(self) -> None:
        for text in ("123", "true", "None", '"quoted"', "[x]", '{"a": 1}', "a=b", "a,b", "-5", "--x", "null"):
            with self.subTest(text):
                self.assertEqual(resolve(f"--prompt={text}").inference.prompt, text)


class Problems(unittest.TestCase):
    def problem(self, *arguments: str, **environment: str) -> str:
        with self.assertRaises(ConfigError) as caught:
            resolve(*arguments, **environment)
        return str(caught.exception)

    def test_unknown_flag_gets_the_nearest_one(self) -> None:
        self.assertIn("did you mean --task.lora.rank", self.problem("--task.lora.rnk", "3"))
        self.assertIn("did you mean --domain.lora.rank", self.problem("--domain_lora.rank", "3"))
        self.assertIn("did you mean --prompt", self.problem("--promt", "Why?"))

    def test_right_field_in_the_wrong_section_is_found(self) -> None:
        self.assertIn("--inference.max_new_tokens", self.problem("--generation.max_new_tokens", "3"))

    def test_unknown_environment_variable_is_named(self) -> None:
        found = self.problem(DTA_TASK__LORA__RANG="3")
        self.assertIn("DTA_TASK__LORA__RANG", found)
        self.assertIn("did you mean DTA_TASK__LORA__RANK", found)
        self.assertIn("DTA_TASK__LORA__RANK:", self.problem(DTA_TASK__LORA__RANK="many"))

    def test_unknown_preset_lists_the_presets(self) -> None:
        self.assertIn("did you mean minimax_m2", self.problem("--preset", "minimax_m3"))
        self.assertIn(", ".join(PRESETS), self.problem("--preset", "x"))

    def test_all_problems_are_reported_together(self) -> None:
        found = self.problem("--task.lora.rank", "0", "--run.seed", "x", "--task.on", "bas")
        for part in ("3 problems", "--task.lora.rank", "--run.seed", "--task.on", "'domain', 'base' or 'domain_ready'"):
            self.assertIn(part, found)
        found = self.problem("stray", "--foo.bar", "1", "--run.name", DTA_FOO="1")
        for part in ("4 problems", "'stray'", "'--foo.bar'", "--run.name needs a value", "'DTA_FOO'"):
            self.assertIn(part, found)

    def test_problems_of_every_kind_come_in_one_message(self) -> None:
        flags_ = [
            "--weigts",
            "3",
            "--task.on=bas",
            "--prompt=x",
            "--prompts_file=y",
            "--compose.also=[1",
            "--run.name=",
        ]
        found = self.problem(*flags_, "--run.trackers", DTA_FOO="1", DTA_RUN__SEED="x", DTA_COMPOSE__METHOD="tis")
        for part in (
            "8 problems",
            "did you mean --weights?",
            "--task.on: input should be",
            "exclude each other",
            "--compose.also: the list cannot be read (got '[1')",
            "--run.trackers needs a value",
            "'DTA_FOO'",
            "DTA_RUN__SEED: input should be",
            "compose.method: no such method (got 'tis')",
        ):
            self.assertIn(part, found)
        self.assertIn("did you mean ties? choices: sum, depth_gate", found)

    def test_a_bad_value_brings_no_problem_that_was_not_typed(self) -> None:
        found = self.problem("--rollout.steps=x", "--rollout.ratios=2", "--rollout.margins=0.1", "--run.name=a/b")
        self.assertIn("2 problems", found)
        found = self.problem("--preset=minimax", "--task.lora.target_modules=gate_proj")
        self.assertNotIn("problems", found)

    def test_secrets_and_other_problems_come_in_one_message(self) -> None:
        found = self.problem("--run.name", "hf_" + "a" * 30, "--weigts", "3")
        self.assertIn("2 problems", found)
        self.assertIn("--run.name holds what looks like", found)

    def test_a_bad_value_names_its_flag(self) -> None:
        cases = {
            "--task.lora.rank": ("x", "1.5", "0", "-1"),
            "--task.lora.dropout": ("1", "-0.1", "nan"),
            "--data.dev_share": ("1.5",),
            "--task.lora.use_rslora": ("maybe",),
            "--base.dtype": ("float16",),
            "--compose.weights": ("a,b", "1,1,1", "[1"),
            "--run.name": ("../up", ".hidden", "a/b", "x" * 101),
            "--run.seed": ("-1", "2147483648"),
        }
        for flag, values in cases.items():
            for value in values:
                with self.subTest(flag, value=value):
                    self.assertIn(flag.removeprefix("--").split(".")[-1], self.problem(f"{flag}={value}"))

    def test_numbers_that_are_not_finite_are_refused(self) -> None:
        for flag in ("--compose.weights", "--domain.train.learning_rate", "--task.lora.alpha"):
            for value in ("nan", "inf"):
                with self.subTest(flag, value=value):
                    self.assertIn(flag, self.problem(flag, f"{value},1" if "weights" in flag else value))

    def test_settings_that_contradict_each_other_are_refused_in_words(self) -> None:
        cases = {
            ("--prompt=x", "--prompts_file=y"): "exclude each other",
            ("--output_file=x",): "needs inference.prompts_file",
            ("--data.dev_share=0.5", "--data.test_share=0.5"): "leave some",
            ("--base.revision=main",): "pin a commit of 40 hex digits",
            ("--task.lora.target_modules=all-linear",): "patterns widen silently",
            ("--task.lora.target_modules=lm_head",): "stay frozen",
            ("--task.train.micro_batch_tokens=100",): "one row must fit a forward pass",
            ("--data.corpus=none", "--data.task=none"): "nothing to prepare",
            ("--data.task=mine.jsonl",): "python_docs",
        }
        for arguments, part in cases.items():
            with self.subTest(arguments):
                self.assertIn(part, self.problem(*arguments))


class MissingCorpus(unittest.TestCase):
    def test_corpus_that_is_not_there_is_said_beside_what_else_is_missing(self) -> None:
        with self.assertRaisesRegex(ConfigError, r"\(nothing is at /nowhere/Unterlage\).*give your own --data.task"):
            resolve("--data.corpus", "/nowhere/Unterlage")


class Presets(unittest.TestCase):
    def test_the_defaults_are_the_default_preset_and_the_embedded_model_is_written_once(self) -> None:
        self.assertEqual(Config(), PRESETS["smollm2_135m"]())
        self.assertEqual(Config().preset, "smollm2_135m")
        written = (ROOT / "config.py").read_text()
        for fact in (Config().base.source, Config().base.sha256, Config().base.name):
            self.assertEqual(written.count(f'"{fact}"'), 1, fact)

    def test_what_is_wrong_together_is_refused_in_python_too(self) -> None:
        sections: dict[str, dict[str, object]] = {
            "no such preset": {"preset": "smollm"},
            "a character that no file holds": {"run": {"models_dir": "a\0b"}},
            "half of a surrogate pair in a list": {"data": {"corpus": ("\udcff",)}},
            "a prompt and prompts": {"inference": {"prompt": "a", "prompts_file": "b"}},
            "weights and a search": {"compose": {"search": True, "weights": (1, 1)}},
        }
        for what, section in sections.items():
            with self.subTest(what), self.assertRaises(ValueError):
                Config(**section)  # type: ignore[arg-type]

    def test_minimax_m2_is_the_pinned_public_model_with_attention_adapters(self) -> None:
        found = resolve("--preset", "minimax_m2")
        self.assertEqual(found.base.source, "MiniMaxAI/MiniMax-M2")
        self.assertRegex(found.base.revision, r"^[0-9a-f]{40}$")
        for section in (found.domain, found.task):
            self.assertEqual(section.lora.target_modules, ("q_proj", "k_proj", "v_proj", "o_proj"))

    def test_runs_are_named_after_the_preset_or_an_own_base(self) -> None:
        def label(**base: str) -> str:
            return run_label(Config(base=BaseModelSection(**base)))

        self.assertEqual(label(), "smollm2_135m")
        self.assertEqual(label(source="/m/models/base/smollm2-135m-instruct-from-q4_1"), "smollm2_135m")
        self.assertEqual(label(source="Qwen/Qwen3-0.6B", revision="0" * 40), "Qwen3-0.6B")
        self.assertEqual(label(source="/home/me/my model (2)"), "my-model-2")
        self.assertEqual(run_label(PRESETS["size_8b"]()), "size_8b")

    def test_every_setting_says_what_it_is(self) -> None:
        for path, field in flags.fields().items():
            self.assertTrue(field.description and field.description.endswith("."), path)

    def test_sections_are_frozen_and_refuse_unknown_names(self) -> None:
        with self.assertRaises(ValueError):
            resolve().run.seed = 3  # type: ignore[misc]
        with self.assertRaises(ValueError):
            Config(rum={})  # type: ignore[call-arg]


class CommandLine(unittest.TestCase):
    def test_help_and_dry_run_of_every_script_answer_without_torch_for_every_preset(self) -> None:
        for script in SCRIPTS:
            with self.subTest(script):
                program, path = ROOT / "tests" / "programs" / "without_torch.py", ROOT / "scripts" / f"{script}.py"
                done = subprocess.run(
                    [sys.executable, str(program), str(path), ",".join(n for n in PRESETS if PRESETS[n]().base.source)],
                    capture_output=True,
                    text=True,
                    check=False,
                    env=clean_environment(),
                    cwd=ROOT,
                )
                self.assertEqual(done.returncode, 0, done.stderr[-2000:])

    def test_dry_run_says_where_values_came_from(self) -> None:
        flags = ["--dry-run", "--preset", "minimax_m2", "--task.lora.rank", "4"]
        done = run_script("train_task_adapter", *flags, env={"DTA_RUN__SEED": "5"})
        self.assertRegex(done.stdout, r"task\.lora\.rank +4 +flag")
        self.assertRegex(done.stdout, r"run\.seed +5 +environment")
        self.assertRegex(done.stdout, r"task\.lora\.alpha +32(\.0)? +preset")

    def test_a_dry_run_names_every_source_that_is_not_there(self) -> None:
        sources = ["--data.corpus=/nowhere/texts", "--data.task=questoins.csv", "--data.task_test=owner/pairs"]
        done = run_script("prepare_data", "--preset", "tiny_minimax_m2", "--dry-run", *sources)
        self.assertEqual(done.returncode, 0, done.stderr)
        for missing in ("'/nowhere/texts' does not exist", "'questoins.csv' does not exist"):
            self.assertIn(f"but now it would stop: {missing}; correct the path", done.stdout)
        self.assertNotIn("'owner/pairs' does not", done.stdout)  # may be a dataset of the hub

    def test_an_error_is_text_on_standard_error_and_exit_code_2_from_any_directory(self) -> None:
        began = time.monotonic()
        done = run_script("evaluate", "--evaluate.resamplez", "3", cwd=Path("/"))
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertTrue(re.match("configuration error: unknown setting", done.stderr), done.stderr)
        # a second on an idle machine; the claim is that torch's several seconds are not waited for
        self.assertLess(time.monotonic() - began, 5)

    def test_scripts_run_as_modules_too(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "scripts.inference", "--dry-run", "--prompt", "x"],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=clean_environment(),
        )
        self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
    unittest.main()
