"""Secrets: planted in the environment and in arguments, they are in nothing that the pipeline writes or prints."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import sys
import unittest
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import config as settings
from tests.support import SECRETS, Workspace, temporary_directory, write_jsonl
from tests.whole_pipeline import whole
from utils import cli, logger, secrets
from utils.artifacts import runs
from utils.artifacts.identity import Identity
from utils.exceptions import ArtefactError, ConfigError, Problem

HUB, PASSWORD = "hf_" + "Ab1" * 12, "p4ssw0rd-of-somebody"
# what is looked for: values of the environment, of arguments, and the password out of its URL
PLANTED = [*(v for name, v in SECRETS.items() if not name.startswith("PIP")), HUB, PASSWORD]
URL = f"https://somebody:{PASSWORD}@example.org/model"
SHAPES = {
    "a hub token": HUB,
    "an OpenAI key": SECRETS["OPENAI_API_KEY"],
    "an OpenAI project key": "sk-proj-abc_DEF-123456789012345678",
    "a GitHub token": "ghp_" + "Ab1" * 12,
    "an AWS key": "AKIA" + "ABCDEFGH12345678",
    "a JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "a password in a URL": URL,
    "a WANDB key by its name": f"WANDB_API_KEY={SECRETS['WANDB_API_KEY']}",
    "a header": f"Authorization: Bearer {'Ab1' * 9}",
}
NO_SECRETS = (
    "models/my-task-adapter-legal-2026-11-24-second-run/adapter",
    "sk-learn-2026-experiment-long-name",
    "models/hf_checkpoints_of_the_second_experiment/x",
    f"revision {'a1' * 20} digest {'a1' * 32}",
    '"eos_token": "<|endoftext|>", "batch_tokens": 1024, "tokenizer": "' + "a1" * 32 + '"',
    "http://127.0.0.1:8001/v1 and user@example.org",
    "the password is forgotten by somebody",
)


def found_in(content: bytes) -> list[str]:
    """The planted secrets in some bytes, in any spelling in which a program writes text."""
    spellings = {}
    for secret in PLANTED:
        quoted = (json.dumps(secret)[1:-1], repr(secret)[1:-1], urllib.parse.quote(secret, safe=""))
        spellings |= dict.fromkeys((secret.encode(), *(text.encode() for text in quoted)), secret)
        spellings |= dict.fromkeys((secret.encode("utf-16-le"), base64.b64encode(secret.encode())[:-3]), secret)
    return [secret for spelling, secret in spellings.items() if spelling in content]


def leaks_below(root: Path) -> list[str]:
    names = [f"the name {p}" for p in root.rglob("*") if found_in(str(p).encode())]
    return names + [str(p) for p in root.rglob("*") if p.is_file() and found_in(p.read_bytes())]


class Nowhere(unittest.TestCase):
    """Every script of the pipeline runs with the secrets of `tests.support.SECRETS` in its environment."""

    def test_the_search_finds_what_is_there(self) -> None:
        root = temporary_directory()
        for number, secret in enumerate(PLANTED):
            (root / f"{number}.bin").write_bytes(b"\x00" + json.dumps({"a": secret}).encode() + b"\xff")
        self.assertEqual(len(leaks_below(root)), len(PLANTED))

    def test_in_nothing_that_the_whole_pipeline_wrote_or_printed(self) -> None:
        place, workspace = whole()
        scripts = {script.command[0] for script in workspace.scripts}
        expected = {"prepare_data", "train_domain_adapter", "train_task_adapter", "compose", "inference", "evaluate"}
        self.assertLessEqual(expected, scripts)
        self.assertTrue(list(place.root.rglob("*.tfevents*")) or not list(place.root.rglob("tracking/*")))
        self.assertGreater(len(list(place.root.rglob("*.json*"))), 20)
        self.assertEqual(leaks_below(place.root), [])
        for script in workspace.scripts:
            self.assertEqual(leaks_below(script.out), [], script.command)

    def test_in_nothing_that_the_other_scripts_and_an_answer_write_or_print(self) -> None:
        place, _ = whole()
        workspace = Workspace()
        prompt = f"What is {HUB} at {URL}, and {SECRETS['HF_TOKEN']}?"
        prompts = write_jsonl(workspace.root / "prompts.jsonl", [{"prompt": "a"}])
        counts = '{"counts": {"rates": {"100": {"units": [40, 4000], "errors": [0, 3]}}}, "step": 0}'
        (workspace.root / "counts.json").write_text(counts)
        started = [
            workspace.start("inference", *place.flags, "--prompt", prompt),
            workspace.start("inference", *place.flags, "--prompts_file", str(prompts)),
            workspace.start("verify", str(place["merged"]), *place.flags),
            workspace.start("rollout", "judge", "--rollout.counts", str(workspace.root / "counts.json")),
            workspace.start("rollout", "simulate", "--rollout.runs", "3"),
            workspace.start("rollout", "kubernetes", "--rollout.output", str(workspace.root / "k8s")),
            workspace.start(
                "train_domain_adapter",
                *("--run.trackers", "tensorboard", "--inputs.prepared", str(place["prepared"])),
                *("--domain.train.max_steps", "2", "--run.name", "tracked"),
            ),
        ]
        for script in started:
            done = script.wait()
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(leaks_below(script.out), [], script.command)
        self.assertIn("<token>", (started[0].out / "stdout").read_text(), "the prompt was to be repeated")
        self.assertTrue(list(workspace.root.rglob("*.tfevents*")))
        self.assertEqual(leaks_below(workspace.root), [])

    def test_in_no_error(self) -> None:
        place, _ = whole()
        workspace = Workspace()
        missing = str(workspace.root / "missing" / HUB)
        for script, *flags in (
            ("prepare_data", "--data.corpus", URL),
            ("prepare_data", "--data.corpus", missing),
            ("prepare_data", "--data.task", SECRETS["HF_TOKEN"]),
            ("train_domain_adapter", "--run.name", HUB),
            ("train_task_adapter", "--task.system_prompt", f"Say {SECRETS['OPENAI_API_KEY']}."),
            ("train_task_adapter", f"--hf_token={HUB}"),
            ("train_task_adapter", "--hub_token", SECRETS["WANDB_API_KEY"]),
            ("compose", "--domain_adapter", missing),
            ("inference", HUB, "--prompt", "x"),
            ("inference", *place.flags, "--prompt", "x", "--inference.max_new_tokens", HUB),
            ("inference", *place.flags, "--merge_path", missing),
            ("evaluate", "--base.source", URL, "--base.revision", "a" * 40),
            ("evaluate", "--preset", SECRETS["OPENAI_API_KEY"]),
            ("verify", missing),
            ("rollout", "start", "--rollout.production", f"http://somebody:{PASSWORD}@127.0.0.1:1"),
            ("rollout", "judge", "--rollout.counts", missing),
            ("benchmark", "--benchmark.repeats", SECRETS["HF_TOKEN"]),
        ):
            with self.subTest(" ".join([script, *flags[:2]])):
                workspace.start(script, *flags)
                done = workspace.scripts[-1].wait()
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertNotIn("Traceback", done.stderr)
                self.assertEqual(leaks_below(workspace.scripts[-1].out), [], done.stderr)
        self.assertEqual(leaks_below(workspace.root), [])

    def test_in_no_traceback_of_a_bug(self) -> None:
        def crash(_: settings.Config) -> dict[str, Any]:
            print("on the way", SECRETS["HF_TOKEN"])
            print("on the way", HUB, file=sys.stderr)
            logging.getLogger("some.library").error("retrying %s", URL)
            raise RuntimeError(f"request with {SECRETS['HF_TOKEN']!r} and {SECRETS['WANDB_API_KEY']} to {URL} failed")

        with mock.patch.dict("os.environ", SECRETS):
            code, out, err = run_in_process(crash)
        self.assertEqual(code, 1)
        self.assertIn("RuntimeError: request with", err)
        self.assertEqual((found_in(out.encode()), found_in(err.encode())), ([], []))
        self.assertIn("on the way <token>", out)

    def test_in_no_log_file_of_a_run_and_no_manifest(self) -> None:
        log = temporary_directory() / "run.log"
        with mock.patch.dict("os.environ", SECRETS), quiet(), logger.to_file(log):
            logger.event("fetching", url=URL, header={"Authorization": f"Bearer {SECRETS['HF_TOKEN']}"})
            logger.warning(f"the key is {SECRETS['WANDB_API_KEY']}", path=Path("/tmp") / HUB)
            with mock.patch.object(sys, "argv", ["inference.py", "--prompt", f"{HUB} {SECRETS['HF_TOKEN']}"]):
                manifest = runs.manifest("merged", Identity({}), base={}, parents=[], measured={})
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        self.assertEqual([line["event"] for line in lines], ["fetching", "the key is <token>"])
        self.assertEqual(found_in(log.read_bytes()), [])
        self.assertEqual(manifest["command"].count("<token>"), 2)


class Shapes(unittest.TestCase):
    def test_each_shape_is_hidden_wherever_it_stands(self) -> None:
        for name, secret in SHAPES.items():
            core = secret.split("Bearer ")[-1].split("=")[-1].replace("https://", "").split("@")[0]
            for text in (secret, f"a {secret} b", json.dumps({"x": secret}), f"({secret})", f"\n{secret}\n"):
                with self.subTest(name):
                    self.assertNotIn(core, secrets.redact(text, {}))
                    self.assertIn("<token>", secrets.redact(text, {}))
                    self.assertTrue(secrets.holds_secret(text))

    def test_what_is_no_secret_stays_as_it_is(self) -> None:
        for text in NO_SECRETS:
            self.assertEqual(secrets.redact(text, {"HOME": "/home/somebody"}), text)

    def test_the_environment_s_values_are_hidden_in_every_spelling_and_words_are_not(self) -> None:
        value = 'un"usual\\ té/ken'
        environment = {"MY_TOKEN": value, "DTA_TASK__TRAIN__BATCH_TOKENS": "notatoken", "PWD": "/home/somebody"}
        environment |= {"SHORT_KEY": "1024", "TOKENIZERS_PARALLELISM": "true-or-false"}
        quoted = json.dumps(value), json.dumps(value, ensure_ascii=False), urllib.parse.quote(value, safe="")
        for text in (value, *quoted):
            self.assertNotIn("un", secrets.redact(f"x{text}y", environment))
        self.assertIn("<token>", secrets.redact(repr([value]), environment))
        for text in ("notatoken", "/home/somebody", "1024", "true-or-false"):
            self.assertEqual(secrets.redact(text, environment), text)

    def test_a_setting_that_holds_one_is_refused_without_saying_it_and_a_prompt_may(self) -> None:
        for path, value in (
            ("run.name", HUB),
            ("run.models_dir", f"x/{HUB}"),
            ("compose.also", f"a,x/{HUB}"),
            ("task.system_prompt", f"Say {HUB}."),
            ("rollout.production", f"http://somebody:{PASSWORD}@127.0.0.1:1"),
        ):
            with self.subTest(path), self.assertRaises(ConfigError) as caught:
                cli.resolve([f"--{path}", value], {})
            self.assertIn(f"--{path} holds what looks like", str(caught.exception))
            self.assertEqual(found_in(str(caught.exception).encode()), [])
        with self.assertRaises(ConfigError) as caught:  # refused for something else, with the value
            cli.resolve(["--run.name", f"x/{HUB}", "--run.seed", HUB], {})
        self.assertEqual(found_in(str(caught.exception).encode()), [])
        self.assertEqual(cli.resolve(["--prompt", HUB], {}).inference.prompt, HUB)


class Harmless(unittest.TestCase):
    """What a model, a file or an artefact says cannot command the terminal that shows it."""

    EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202egpj.exe\u2066\x00\u2028"

    def test_printed_text_keeps_words_of_every_language_and_loses_every_command(self) -> None:
        for text in (
            "naïve\tcafé\n",
            "日本語\u3000です",
            "می\u200cخواهم",
            "👩\u200d🚀",
            "Bonjour\u00a0!",
            "हिन्दी\u200d",
        ):
            self.assertEqual(logger.printable(text), text)
        shown = logger.printable(self.EVIL)
        self.assertTrue(all(c.isprintable() or c == "\ufffd" for c in shown), ascii(shown))
        self.assertIn("owned", shown)

    def test_prompt_answer_log_and_error_pass_through_it_and_json_keeps_everything(self) -> None:
        def say(_: settings.Config) -> dict[str, Any]:
            print("answer:", self.EVIL)
            logger.event(f"read {self.EVIL}", path=self.EVIL)
            return {"answer": self.EVIL}

        def fail(_: settings.Config) -> dict[str, Any]:
            raise ArtefactError(Problem(f"{self.EVIL} is wrong", self.EVIL, f"see {self.EVIL}"))

        _, out, err = run_in_process(say)
        self.assertEqual(json.loads(out.split("\n")[-2]), {"answer": self.EVIL})
        code, _, failed = run_in_process(fail)
        self.assertEqual(code, 2)
        for text in (out, err, failed):
            self.assertEqual([c for c in text if c in self.EVIL and not c.isprintable()], [], ascii(text))
        self.assertIn("owned", failed)

    def test_files_that_hold_commands_are_read_and_their_names_shown_harmlessly(self) -> None:
        workspace = Workspace()
        evil = workspace.root / "evil\x1b[31m.jsonl"
        evil.write_text('{"question": "q \\u001b[2J", "answer": "a\\u009b"}\n{broken\n')
        workspace.start("prepare_data", "--data.corpus", "none", "--data.task", str(evil))
        done = workspace.scripts[-1].wait()
        self.assertEqual(done.returncode, 2)
        self.assertIn("jsonl:2: not valid JSON", done.stderr)
        self.assertNotIn("\x1b", done.stderr + done.stdout)


def run_in_process(main: Any) -> tuple[int, str, str]:
    """`cli.run` here: exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), quiet():
        try:
            cli.run(main, lambda config: [], sections=("run",), description="", argv=[])
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("it did not end")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Whatever loggers do inside, the handlers and the stream that they had come back."""
    ours, root = logging.getLogger("adapters"), logging.getLogger()
    before = [(log, log.handlers[:], log.propagate, log.level) for log in (ours, root)]
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log, handlers, propagate, level in before:
            log.handlers[:], log.propagate = handlers, propagate
            log.setLevel(level)


if __name__ == "__main__":
    unittest.main()
