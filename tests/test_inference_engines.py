"""The engine's client against a server that looks like vLLM's, in every way that one can fail; no real server here.

The real one: tests/test_inference_vllm.py (make serving-test).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import unittest
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from config import ATTENTION, BaseModelSection, Config, InferenceSection, PlanSection
from tests import minimax_support, vllm_rules
from tests.engine_support import RunningStub, left_in, owned_by, stub_python, until
from tests.support import ROOT, clean_environment, expert_factors, random_factors, saved_model, temporary_directory
from utils.cli import help_text
from utils.exceptions import EngineError, PipelineError
from utils.inference.answer_journal import AnswerJournal
from utils.inference.engines import endpoint, engine, server_process, vllm_command
from utils.inference.engines.endpoint import Sampling
from utils.inference.engines.engine import Engine
from utils.inference.engines.served_model import ServedModel, positions_of
from utils.inference.engines.vllm_command import EngineNeeds
from utils.models import chat, loading, sources
from utils.models.architectures import registry
from utils.models.base_model import BaseModel

SECTION = BaseModelSection(source="", dtype="float32")
PROMPTS = [[5, 6, 7, number] for number in range(40)]
HOW = Sampling(8, (3,))


def setUpModule() -> None:
    global BASE, FACTORS
    BASE = saved_model("llama")
    model = loading.load_model(BASE, SECTION)
    FACTORS = random_factors(model, ["q_proj", "v_proj"], 4, 8, seed=1)
    patches = [
        mock.patch.object(endpoint, "RETRY_SECONDS", (0.01, 0.01)),
        mock.patch.object(engine, "LOOK_SECONDS", 0.02),
    ]
    for patch in patches:
        patch.start()
        unittest.addModuleCleanup(patch.stop)


class Place(unittest.TestCase):
    """Each test has a models directory of its own, where nothing may be left."""

    def setUp(self) -> None:
        self.models = temporary_directory()

    def tearDown(self) -> None:
        self.assertEqual(left_in(self.models), [])
        self.assertEqual(owned_by(self.models), [])

    @contextlib.contextmanager
    def started(self, rank: int = 4, **faults: Any) -> Iterator[Engine]:
        settings = InferenceSection(engine="vllm", engine_python=str(stub_python()))
        with (
            mock.patch.dict(os.environ, {"ENGINE_STUB": json.dumps(faults)}),
            Engine(BASE, SECTION, settings, EngineNeeds(64, rank), self.models) as made,
        ):
            yield made

    @contextlib.contextmanager
    def attached(self, stub: RunningStub, positions: int = 64) -> Iterator[Engine]:
        settings = InferenceSection(engine="openai", engine_url=stub.url)
        with Engine(BASE, SECTION, settings, EngineNeeds(positions, 4), self.models) as made:
            yield made

    def refused(self, *parts: str) -> Any:
        return self.assertRaisesRegex(EngineError, "(?s)" + ".*".join(map(re.escape, parts)))


class Started(Place):
    def test_started_server_answers_for_base_and_adapter_and_is_gone_afterwards(self) -> None:
        with self.started(stubborn_child=True) as found:
            seen: dict[int, list[int]] = {}
            plain = found.ask(PROMPTS, lambda _: HOW, answered=seen.__setitem__)
            name = found.load("composed", FACTORS, PROMPTS[0])
            adapted = found.ask(PROMPTS, lambda _: HOW, name)
            # the guard, the server, and a child that ends at SIGKILL alone
            self.assertGreaterEqual(len(owned_by(self.models)), 3)
            (home,) = self.models.iterdir()
            said = (home / server_process.LOG).read_text()
        self.assertEqual([seen[number] for number in range(len(PROMPTS))], plain)
        self.assertNotEqual(plain, adapted)
        self.assertTrue(all(ids[-1] == 3 for ids in plain))
        words = json.loads(said.partition("command: ")[2].splitlines()[0])
        self.assertEqual(words[:4], ["-m", "vllm.entrypoints.openai.api_server", "--model", str(BASE.directory)])
        for pair in ("--dtype float32", "--max-model-len 64", "--max-lora-rank 8", "--host 127.0.0.1"):
            self.assertIn(pair, " ".join(words))
        self.assertNotIn("api-key", " ".join(words))

    def test_nothing_is_started_before_something_is_asked(self) -> None:
        with self.started() as found:
            self.assertEqual(owned_by(self.models), [])
            self.assertEqual(found._loaded, {})

    def test_port_that_is_taken_meanwhile_is_exchanged_for_another(self) -> None:
        with RunningStub(BASE.directory) as other:
            ports = [other.port, other.port, server_process.free_port()]
            with mock.patch.object(server_process, "free_port", side_effect=ports), self.started() as found:
                self.assertEqual(len(found.ask(PROMPTS[:2], lambda _: HOW)), 2)
            self.assertEqual(other.says()["answered"], 0)

    def test_server_that_cannot_start_is_quoted(self) -> None:
        with (
            self.refused("ended before it answered", "no kernel for this card"),
            self.started(refuses_to_start="no kernel for this card") as found,
        ):
            found.start()

    def test_server_that_dies_in_the_middle_costs_the_open_requests_only(self) -> None:
        journal = AnswerJournal(self.models / "answers.jsonl", "run")
        settings = InferenceSection(engine="vllm", engine_python=str(stub_python()), max_new_tokens=8)
        how = {"models_dir": self.models, "rank": 4, "positions": positions_of(PROMPTS, 8), "journal": journal}
        dies = {"ENGINE_STUB": json.dumps({"die_after": 13})}
        few, dying = mock.patch.object(engine, "AT_ONCE", 4), mock.patch.dict(os.environ, dies)
        ended = self.refused("ended while it was asked")
        with few, dying, ended, ServedModel(BASE, SECTION, settings, **how) as model:
            model.answers(PROMPTS, "composed", FACTORS, "answers")
        # the probe asked twice
        kept = len(journal.known())
        self.assertGreaterEqual(kept, 11 - 4)
        self.assertLessEqual(kept, 11)
        with ServedModel(BASE, SECTION, settings, **how) as model:
            found = model.answers(PROMPTS, "composed", FACTORS, "answers")
        self.assertEqual(len(journal.path.read_text().splitlines()), len(PROMPTS))
        with ServedModel(BASE, SECTION, settings, **how) as model:  # everything is there: nothing is started
            self.assertEqual(model.answers(PROMPTS, "composed", FACTORS, "answers"), found)
            self.assertEqual(owned_by(self.models), [])
        with ServedModel(BASE, SECTION, settings, **{**how, "journal": None}) as model:
            self.assertEqual(model.answers(PROMPTS, "composed", FACTORS, "answers"), found)

    def test_python_without_vllm_is_named_before_anything_is_started(self) -> None:
        settings = InferenceSection(engine="vllm", engine_python="/nowhere/python")
        with self.refused("no Python with vLLM", "/nowhere/python", "make serving-test"):
            Engine(BASE, SECTION, settings, EngineNeeds(), self.models)


class Attached(Place):
    def test_attached_server_gets_the_adapter_and_loses_it_again(self) -> None:
        with RunningStub(BASE.directory) as stub:
            with self.attached(stub) as found:
                name = found.load("composed", FACTORS, PROMPTS[0])
                served = found.ask(PROMPTS, lambda _: HOW, name)
                self.assertEqual(list(stub.says()["adapters"]), [name])
            self.assertEqual(stub.says()["adapters"], {})
            self.assertIsNone(stub.process.poll())
        with self.started() as own:
            self.assertEqual(own.ask(PROMPTS, lambda _: HOW, own.load("composed", FACTORS, PROMPTS[0])), served)

    def test_each_fault_has_its_own_words(self) -> None:
        cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
            (
                {"no_route": True},
                ("has no /v1/load_lora_adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "--enable-lora"),
            ),
            ({"no_lora": True}, ("LoRA is switched off", "--enable-lora --max-lora-rank 4")),
            ({"other_disk": True}, ("finds no adapter in", "shares")),
            ({"forgets": True}, ("has no model or adapter composed-", "does not exist")),
            ({"unlisted": True}, ("does not list it",)),
            ({"parent": "another"}, ("to another, not to",)),
            ({"ignores_adapter": True}, ("the same with the adapter", "not applied")),
            ({"root": "/models/other"}, ("the server's model is /models/other", "--base.source")),
            ({"max_model_len": 32}, ("64 tokens, the server has 32", "--max-model-len 64")),
            ({"no_ids": True}, ("does not give back token ids", "0.10.2")),
            ({"other_prompt": True}, ("another prompt", "unlike from number 0")),
            ({"key": "a-secret-of-the-server"}, ("wants another key", "VLLM_API_KEY")),
            ({"fail_first": 99}, ("asked 3 times", "HTTP 500", "EngineCore encountered an issue")),
            ({"hang": 5.0}, ("no answer in 0.3 s",)),
        ]
        texts = set()
        with RunningStub(BASE.directory) as stub, mock.patch.object(endpoint, "ANSWER_SECONDS", 0.3):
            for faults, parts in cases:
                stub.set(**faults)
                with self.subTest(faults), self.refused(*parts) as caught, self.attached(stub) as found:
                    found.ask(PROMPTS[:3], lambda _: HOW, found.load("composed", FACTORS, PROMPTS[0]))
                self.assertEqual(caught.exception.exit_code, 2)
                texts.add(str(caught.exception))
                self.assertTrue(all(problem.fix for problem in caught.exception.problems), faults)
        self.assertEqual(len(texts), len(cases))
        with self.refused("connection to the server was lost", "refused"), self.attached(stub) as found:
            found.ask(PROMPTS, lambda _: HOW)

    def test_server_that_fails_for_a_moment_is_asked_again(self) -> None:
        with RunningStub(BASE.directory, fail_first=2) as stub, self.attached(stub) as found:
            self.assertEqual(len(found.ask(PROMPTS[:1], lambda _: HOW)), 1)
            self.assertEqual(stub.says()["answered"], 3)

    def test_server_killed_while_asked_is_a_lost_connection(self) -> None:
        lost = self.refused("connection to the server was lost")
        with RunningStub(BASE.directory, die_after=5) as stub, lost, self.attached(stub) as found:
            found.ask(PROMPTS, lambda _: HOW)

    def test_key_comes_from_the_environment_and_stands_in_no_message(self) -> None:
        key = "k3y-of-a-server-0123456789"
        given = mock.patch.dict(os.environ, {"VLLM_API_KEY": key})
        with given, RunningStub(BASE.directory, key=key) as stub, self.attached(stub) as found:
            found.ask(PROMPTS[:1], lambda _: HOW)
            stub.set(key=key, fail_first=99)
            with self.assertRaises(EngineError) as caught:
                found.ask(PROMPTS[:1], lambda _: HOW)
        self.assertNotIn(key, str(caught.exception))

    def test_base_that_is_named_by_its_hub_id_is_the_base(self) -> None:
        base = replace(BASE, source="org/name", revision="a" * 40)
        with RunningStub(Path("org/name")) as stub:
            settings = InferenceSection(engine="openai", engine_url=f"{stub.url}/v1/")
            with Engine(base, SECTION, settings, EngineNeeds(64), self.models) as found:
                self.assertEqual(len(found.ask(PROMPTS[:2], lambda _: HOW)), 2)

    def test_proxy_of_the_environment_is_not_asked_about_this_machine(self) -> None:
        proxy = mock.patch.dict(os.environ, {"HTTP_PROXY": "http://127.0.0.1:9"})
        with proxy, RunningStub(BASE.directory) as stub, self.attached(stub) as found:
            self.assertEqual(len(found.ask(PROMPTS[:1], lambda _: HOW)), 1)


class Answers(Place):
    def test_streamed_text_is_the_text_of_the_whole_answer(self) -> None:
        settings = InferenceSection(engine="openai", engine_url="", max_new_tokens=8)
        with RunningStub(BASE.directory) as stub:
            settings = settings.model_copy(update={"engine_url": stub.url})
            with ServedModel(BASE, SECTION, settings, models_dir=self.models, rank=4) as model:
                for prompt in PROMPTS[:5]:
                    pieces: list[str] = []
                    streamed = model.stream(prompt, "composed", FACTORS, pieces.append)
                    (whole,) = model.answers([prompt], "composed", FACTORS, "answers")
                    self.assertEqual(streamed, whole)
                    self.assertTrue(whole.ended)
                    self.assertEqual("".join(pieces), streamed.text)

    def test_everything_that_decides_an_answer_is_sent(self) -> None:
        for name, value in {"repetition_penalty": 1.3, "top_k": 7}.items():
            (BASE.directory / chat.GENERATION).write_text(json.dumps({name: value, "eos_token_id": [2, 3]}))
            greedy, sampled = (
                self.sampling(InferenceSection(engine="openai", engine_url="http://x:1", temperature=t, top_p=0.5))
                for t in (0.0, 0.7)
            )
            self.assertEqual((greedy.temperature, greedy.top_p, greedy.top_k, greedy.seed), (0.0, 1.0, 0, None))
            self.assertEqual((sampled.temperature, sampled.top_p), (0.7, 0.5))
            self.assertLessEqual({2, 3}, set(greedy.stops))
            self.assertEqual(getattr(sampled, name), value)
        self.assertEqual(sampled.repetition_penalty, 1.0)
        body = sampled.body()
        sent = {**body, **body["extra_body"]}
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids", "max_tokens"):
            self.assertIn(name, sent)
        self.assertTrue(sent["return_token_ids"])

    def sampling(self, settings: InferenceSection) -> Sampling:
        with ServedModel(BASE, SECTION, settings, models_dir=self.models, rank=0) as model:
            return model._usual

    def test_prompt_beyond_a_table_of_positions_is_refused_before_a_start(self) -> None:
        settings = InferenceSection(engine="openai", engine_url="http://127.0.0.1:9")
        table = mock.patch("utils.models.structure.model_class.position_table", return_value=16)
        with table, self.assertRaisesRegex(PipelineError, "the model has 16 positions"):
            ServedModel(BASE, SECTION, settings, models_dir=self.models, rank=0, positions=20)

    def test_changed_and_foreign_lines_of_a_journal_are_not_believed(self) -> None:
        path = self.models / "answers.jsonl"
        AnswerJournal(path, "run").add("a", [1])
        AnswerJournal(path, "run").add("b", [2])
        AnswerJournal(path, "another").add("c", [3])
        path.write_text(path.read_text().replace("[2]", "[9]") + '{"key": "d", "ids')
        self.assertEqual(AnswerJournal(path, "run").known(), {"a": [1]})


class Leftovers(Place):
    """A command that is killed: its server ends with it, and the next start tidies up after it and nobody else."""

    PROGRAM = """
import sys, time
from pathlib import Path
from utils.inference.engines.server_process import ServerProcess, folder
with folder(Path(sys.argv[1])) as home:
    server = ServerProcess([sys.argv[2], "--model", "m", "--port", sys.argv[3]], {"PATH": "/usr/bin:/bin"}, 1, home)
    print("started", flush=True)
    time.sleep(600)
"""

    def command(self, models: Path) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", self.PROGRAM, str(models), str(stub_python()), str(server_process.free_port())]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        started = subprocess.Popen(words, cwd=ROOT, env=clean_environment(), text=True, **pipes)
        assert started.stdout is not None
        self.assertEqual(started.stdout.readline(), "started\n")
        until(lambda: len(owned_by(models)) == 2 * len(left_in(models)), "the server does not start")
        self.addCleanup(started.stdout.close)
        return started

    def test_server_of_a_killed_command_ends_and_the_next_start_removes_its_folder_alone(self) -> None:
        killed, living = self.command(self.models), self.command(self.models)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        until(lambda: len(owned_by(self.models)) == 2, "the server outlives its command")
        self.assertEqual(len(left_in(self.models)), 2)
        with server_process.folder(self.models) as home:
            self.assertEqual(len(left_in(self.models)), 2)
            self.assertTrue(home.is_dir())
            self.assertEqual(len(owned_by(self.models)), 2)
        self.assertIsNone(living.poll())
        living.send_signal(signal.SIGINT)
        living.wait()
        until(lambda: not owned_by(self.models), "the server outlives its command")

    def test_server_whose_guard_was_killed_too_is_ended_by_the_next_start(self) -> None:
        orphan = ["sh", "-c", "trap '' TERM; while :; do sleep 0.2; done"]
        left = self.models / f"{server_process.PREFIX}abc@{socket.gethostname()}"
        (left / "adapters").mkdir(parents=True)
        mine = subprocess.Popen(orphan, env={server_process.OWNER: str(left.resolve()), "PATH": "/usr/bin:/bin"})
        other = subprocess.Popen(orphan, env={server_process.OWNER: "/another/.engine-x", "PATH": "/usr/bin:/bin"})
        self.addCleanup(other.kill)
        with mock.patch.object(server_process.server_guard, "PATIENCE_SECONDS", 0.2):
            server_process.end_leftovers(self.models)
        self.assertIsNotNone(mine.poll())
        self.assertIsNone(other.poll())
        other.kill()
        other.wait()


class Settings(unittest.TestCase):
    def test_what_does_not_go_together_is_refused_with_what_does(self) -> None:
        cases = {
            "needs no": {"engine_url": "http://h:1"},
            "running server": {"engine": "openai"},
            "write http": {"engine": "openai", "engine_url": "h:1"},
            "engine vllm": {"engine_python": "/usr/bin/python"},
        }
        for part, values in cases.items():
            with self.subTest(values), self.assertRaisesRegex(ValueError, part.replace("needs no", "running server")):
                Config(inference=InferenceSection(**values))
        with self.assertRaisesRegex(ValueError, "quantization nf4"):
            Config(base=BaseModelSection(quantization="nf4"), inference=InferenceSection(engine="vllm"))

    def test_minimax_m2_is_split_as_vllms_recipe_says(self) -> None:
        published = registry.published("MiniMaxAI/MiniMax-M2")
        self.assertIsNotNone(published)
        directory = temporary_directory() / "m2"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(dict(published.settings)))
        base = BaseModel(directory, "m2", "", "d", "t")
        stored = json.loads((directory / "config.json").read_text())
        plain = {k: v for k, v in stored.items() if k != "quantization_config"} | {"dtype": "bfloat16"}
        for settings, memory, adapters, expected in (
            (plain, 80, True, "8 --enable-expert-parallel --all2all-backend allgather_reducescatter"),
            (plain, 80, False, "8 --enable-expert-parallel"),
            (plain, 141, True, "4"),
            (stored, 80, False, "4"),
        ):
            (directory / "config.json").write_text(json.dumps(settings))
            plan = PlanSection(gpus=8, gpu_memory_gib=memory)
            words = vllm_command.parallel_on(base, plan, with_adapters=adapters)
            self.assertEqual(" ".join(words), f"--tensor-parallel-size {expected}")
        (directory / "config.json").write_text(json.dumps(plain))
        with self.assertRaisesRegex(EngineError, "8 GPUs of 80 GiB, 4 are here.*(?s:.)*openai"):
            vllm_command.parallel_on(base, PlanSection(gpus=4, gpu_memory_gib=80), with_adapters=False)

    def test_adapters_of_minimax_m2_are_written_as_vllm_reads_them(self) -> None:
        section = BaseModelSection(source=str(minimax_support.checkpoint("bfloat16")), dtype="float32")
        base = sources.fetch(section, temporary_directory())
        model = loading.load_model(base, section)
        settings = json.loads((base.directory / "config.json").read_text())
        how = InferenceSection(engine="openai", engine_url="http://127.0.0.1:9")
        for experts in (False, True):
            factors = random_factors(model, ATTENTION, 4, 8, seed=1)
            factors |= expert_factors(model, 2, 4, seed=2) if experts else {}
            made = Engine(base, section, how, EngineNeeds(64, 4), temporary_directory())
            made._home = temporary_directory()
            written = made._written("m2", factors)
            self.assertEqual(vllm_rules.problems_of_adapter(written, settings, experts=experts), [])

    def test_the_help_of_the_settings_names_every_engine(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            text = help_text.page("", ("inference",), (), ["inference.engine"])
        for name in ("local", "vllm", "openai"):
            self.assertIn(name, text)


if __name__ == "__main__":
    unittest.main()
