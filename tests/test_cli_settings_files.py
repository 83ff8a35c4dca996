"""`--config` and `--print-config`: where a value comes from, which one wins, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from pydantic import ValidationError

from config import PRESETS, Config, TrainSection
from utils import cli, flags
from utils.cli import settings_files
from utils.exceptions import ConfigError

ROOT = Path(__file__).resolve().parents[1]
YAML = """
preset: tiny_minimax_m2
task:
  lora: {rank: 9}
domain.train.learning_rate: 2e-4
run: {seed: 3, trackers: []}
data:
  corpus: ["~/legal, v2", b]
  task: pairs.jsonl
"""


class SettingsFiles(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)

    def file(self, name: str, text: str) -> str:
        path = self.root / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    def test_flag_before_environment_before_the_last_file_before_preset(self) -> None:
        first = self.file("first.yaml", YAML)
        second = self.file("second.toml", "[run]\nseed = 5\n[task.train]\nepochs = 4\n")
        found = cli.resolve(["--config", first, second, "--task.lora.rank", "7"], {"DTA_TASK__TRAIN__EPOCHS": "2"})
        self.assertEqual(found.preset, "tiny_minimax_m2")
        self.assertEqual((found.task.lora.rank, found.task.train.epochs, found.run.seed), (7, 2, 5))
        self.assertEqual((found.domain.train.learning_rate, found.run.trackers), (2e-4, ()))
        self.assertEqual(found.data.corpus, (os.path.expanduser("~/legal, v2"), "b"))
        self.assertEqual(found.overrides["run.seed"], f"file {second}")
        self.assertEqual(found.overrides["task.lora.rank"], "flag")
        other = cli.resolve([f"--config={first}", "--preset", "minimax_m2", "--data.corpus", "none"], {})
        self.assertEqual(other.preset, "minimax_m2")

    def test_the_config_json_of_an_earlier_run_is_read_under_the_names_of_today(self) -> None:
        recorded = cli.resolve(["--domain.train.warmup_ratio", "0.25"], {}).model_dump(mode="json")
        train = recorded["domain"]["train"]
        train["warmup_share"], train["sequence_tokens"] = train.pop("warmup_ratio"), train.pop("max_sequence_tokens")
        found = cli.resolve(["--config", str(self.file("config.json", json.dumps(recorded)))], {})
        self.assertEqual(found.domain.train.warmup_ratio, 0.25)

    def test_the_config_json_of_a_run_says_what_it_was_and_repeats_no_preset_as_a_wish(self) -> None:
        made = cli.resolve(["--task.lora.rank", "5", "--weights", "1,0.5"], {"DTA_RUN__SEED": "8"})
        recorded = self.file("config.json", json.dumps(made.model_dump(mode="json")))
        found = cli.resolve(["--config", recorded], {})
        self.assertEqual(found.model_dump(exclude={"overrides"}), made.model_dump(exclude={"overrides"}))
        self.assertEqual(set(found.overrides), {"task.lora.rank", "compose.weights", "run.seed"})

    def test_what_is_printed_is_read_again(self) -> None:
        for preset in PRESETS:
            own = [] if PRESETS[preset]().base.source else ["--base.source=somewhere"]
            made = cli.resolve(["--preset", preset, *own, "--weights", "1,0.25,1,0", "--compose.also", "x,y"], {})
            text = settings_files.as_yaml(
                made, [name for name in Config.model_fields if name not in ("preset", "overrides")]
            )
            found = cli.resolve(["--config", self.file(f"{preset}.yaml", text)], {})
            self.assertEqual(found.model_dump(exclude={"overrides"}), made.model_dump(exclude={"overrides"}))

    def test_every_problem_is_told_at_once_by_file(self) -> None:
        bad = self.file("bad.yaml", "task: {lora: {rnk: 8, rank: x}}\nrun: 5\n")
        listed, broken = self.file("list.yaml", "- a\n"), self.file("broken.json", "{")
        with self.assertRaises(ConfigError) as caught:
            cli.resolve(["--config", bad, listed, broken, str(self.root / "absent.yaml"), "--run.sed", "1"], {})
        said = str(caught.exception)
        for part in (
            "did you mean task.lora.rank",
            f"task.lora.rank (file {bad})",
            "run is a section",
            "this is a list",
            "broken.json",
            "no such file",
            "--run.sed",
        ):
            self.assertIn(part, said)

    def test_a_secret_in_a_file_is_refused(self) -> None:
        path = self.file("secret.yaml", "run: {name: hf_abcdefghijklmnopqrstuvwxyzABCDEFGH}\n")
        with self.assertRaisesRegex(ConfigError, "password or an access token"):
            cli.resolve(["--config", path], {})

    def test_lists_with_commas_in_quotes_and_the_home_folder(self) -> None:
        words = ["--data.task", "none", "--data.corpus", '"legal, v2",b', "--run.models_dir=~/models"]
        found = cli.resolve([*words, "--run.trackers", "none"], {})
        self.assertEqual((found.data.corpus, found.run.trackers), (("legal, v2", "b"), ()))
        self.assertEqual(found.run.models_dir, Path("~/models").expanduser())

    def test_the_recorded_command_can_be_typed_again(self) -> None:
        environment = {"DTA_RUN__SEED": "3", "DTA_DATA__CORPUS": "a b.txt", "HF_TOKEN": "hf_secret"}
        said = flags.command(["scripts/compose.py", "--weights", "1,0.5"], environment)
        self.assertEqual(said, "DTA_DATA__CORPUS='a b.txt' DTA_RUN__SEED=3 python scripts/compose.py --weights 1,0.5")

    def test_print_config_of_a_script(self) -> None:
        command = [sys.executable, str(ROOT / "scripts/compose.py"), "--print-config", "--weights", "1,0.5"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = cli.resolve(["--config", self.file("printed.yaml", done.stdout)], {})
        self.assertEqual(found.compose.weights, (1.0, 0.5))

    def ways(self, yaml: str, json_text: str, toml: str, flags_given: dict[str, str]) -> list[tuple[list[str], dict]]:
        """One wish as each way of saying it."""
        named = [("a.yaml", yaml), ("b.json", json_text), ("c.toml", toml)]
        words = [word for path, value in flags_given.items() for word in (f"--{path}", value)]
        return [
            *((["--config", self.file(name, text)], {}) for name, text in named),
            (words, {}),
            ([], {flags.variable(path): value for path, value in flags_given.items()}),
        ]

    def test_the_same_settings_are_the_same_however_they_are_given(self) -> None:
        yaml = """
task: {on: base, keep_domain: off, train: {learning_rate: 2e-4}}
run: {name: 2024-11-30, seed: 3, expert_parallel: off}
evaluate: {seeds: 1}
compose: {weights: 0.5}
data: {task: 5, corpus: [1, '~/x']}
"""
        given = {"task.on": "base", "task.keep_domain": "off", "task.train.learning_rate": "2e-4", "data.task": "5"}
        given |= {"run.name": "2024-11-30", "run.seed": "3", "run.expert_parallel": "off", "evaluate.seeds": "1"}
        given |= {"compose.weights": "0.5", "data.corpus": "1,~/x"}
        nested = {"task": {"on": "base", "keep_domain": "off", "train": {"learning_rate": 2e-4}}, "evaluate.seeds": 1}
        nested |= {"run": {"name": "2024-11-30", "seed": 3, "expert_parallel": "off"}, "compose": {"weights": 0.5}}
        nested |= {"data": {"task": 5, "corpus": [1, "~/x"]}}
        toml = "".join(f"{path} = {json.dumps(value)}\n" for path, value in given.items() if "." not in value)
        toml += "compose.weights = 0.5\n"
        found = [cli.resolve(*way) for way in self.ways(yaml, json.dumps(nested), toml, given)]
        plain = [one.model_dump(exclude={"overrides"}) for one in found]
        for other in plain[1:]:
            self.assertEqual(other, plain[0])
        self.assertEqual(
            (found[0].task.on, found[0].run.name, found[0].compose.weights), ("base", "2024-11-30", (0.5,))
        )
        for one in found:
            self.assertEqual(set(one.overrides), set(given))

    def test_what_cannot_be_is_refused_however_it_is_given(self) -> None:
        for yaml, json_text, toml, given, said in (
            ("run.seed: true", '{"run.seed": true}', "run.seed = true", {"run.seed": "true"}, "run.seed|RUN__SEED"),
            ("run.sed: 1", '{"run": {"sed": 1}}', "run.sed = 1", {"run.sed": "1"}, "did you mean .*(seed|SEED)"),
            ("compose.weights: [x]", '{"compose.weights": ["x"]}', "compose.weights = ['x']", {"compose.weights": "x"},
             "valid number"),
        ):  # fmt: skip
            for way in self.ways(yaml, json_text, toml, given):
                with self.subTest(way), self.assertRaisesRegex(ConfigError, said):
                    cli.resolve(*way)
        for text in ("run.name: 1.10", "run.name: true"):
            with self.assertRaisesRegex(ConfigError, "write it in quotes"):
                cli.resolve(["--config", self.file("unquoted.yaml", text)], {})

    def test_of_an_own_base_nothing_is_printed_that_is_about_the_presets(self) -> None:
        script = [sys.executable, str(ROOT / "scripts/prepare_data.py"), "--print-config"]
        listed = self.file("own.yaml", "base: {source: my_model}\n")
        for words, variables in (
            (["--base.source", "my_model"], {}),
            (["--preset", "minimax_m2", "--base.source", "my_model"], {}),
            (["--config", listed], {}),
            ([], {"DTA_BASE__SOURCE": "my_model"}),
        ):
            done = subprocess.run(
                [*script, *words], capture_output=True, text=True, check=True, env=os.environ | variables
            )
            found = cli.resolve(["--config", self.file("printed.yaml", done.stdout)], {}).base
            self.assertEqual((found.source, found.revision, found.sha256, found.name), ("my_model", "", "", ""), words)
        kept = cli.resolve(["--base.source", "my_model", "--base.name", "mine", "--base.revision", "a" * 40], {})
        self.assertEqual((kept.base.name, kept.base.revision), ("mine", "a" * 40))
        self.assertEqual(flags.given(kept, "base").count("--base."), 3)
        own = cli.resolve(["--base.source", "my_model"], {})
        self.assertEqual(flags.given(own, "base"), " --base.source my_model")
        self.assertEqual(set(own.overrides), {"base.source"})

    def test_a_former_name_says_what_it_was_renamed_to_wherever_it_is_typed(self) -> None:
        self.assertEqual(len(flags.RENAMED), 6)
        for former, name in flags.RENAMED.items():
            self.assertIn(name, flags.fields())
            self.assertNotIn(former, flags.fields())
            field = former.rpartition(".")[2]
            section, value = former.split(".")[0], "64" if "tokens" in former else "0.5"
            nested = json.dumps({section: {"train": {field: float(value)}}})
            for arguments, environment, said in (
                ([f"--{former}", value], {}, f"--{former} was renamed to --{name}"),
                ([], {flags.variable(former): value}, f"was renamed to {flags.variable(name)}"),
                (["--config", self.file("dotted.yaml", f"{former}: {value}")], {}, f"{former} was renamed to {name}"),
                (["--config", self.file("nested.json", nested)], {}, f"{former} was renamed to {name}"),
            ):
                with self.subTest(former, arguments=arguments), self.assertRaises(ConfigError) as caught:
                    cli.resolve(arguments, environment)
                self.assertIn(said, str(caught.exception))
            with self.assertRaisesRegex(ValidationError, f"{field} was renamed to {name.rpartition('.')[2]}"):
                TrainSection.model_validate({field: float(value)})


if __name__ == "__main__":
    unittest.main()
