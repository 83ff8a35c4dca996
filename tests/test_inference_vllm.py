"""A real vLLM (its CPU build): greedy answers as without it, the commands of docs/serving.md, and its failures.

Takes a quarter of an hour and an environment of 3.4 GB: make serving-test. What a client makes of every failure is in
test_inference_engines, on a stub.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import unittest
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import config as settings
from config import BaseModelSection, InferenceSection
from tests.engine_support import left_in, owned_by, until
from tests.support import (
    ROOT,
    clean_environment,
    embedded_models,
    last_json,
    random_factors,
    temporary_directory,
)
from utils import logger
from utils.adapters import adapter_files, inference_layers
from utils.adapters.factors import Factors, of_one_rank
from utils.artifacts import files
from utils.composition.methods import Recipe, compose
from utils.exceptions import EngineError
from utils.inference import generation
from utils.inference.engines import server_process, vllm_command
from utils.inference.engines.endpoint import Sampling
from utils.inference.engines.engine import Engine
from utils.inference.engines.served_model import ServedModel, positions_of, rank_of
from utils.inference.engines.vllm_command import EngineNeeds
from utils.models import chat, loading, sources
from utils.models.architectures import toy
from utils.models.base_model import BaseModel

WANTED = os.environ.get("SERVING_TESTS") == "1"
PYTHON = ROOT / vllm_command.PYTHON
REASON = "a real vLLM takes a quarter of an hour and 3.4 GB: make serving-test"
FLOAT32 = BaseModelSection(source="", dtype="float32")
SYSTEM = "You answer questions briefly and correctly."
QUESTIONS = (
    "What does json.dumps do?",
    "Name three colours.",
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "What does shlex.quote return?",
    "Say something about the sea.",
)
SHORT = (
    *("--data.max_documents", "24", "--data.max_train_examples", "16", "--data.max_dev_examples", "4"),
    *("--data.max_test_examples", "8"),
)
FEW_STEPS = (
    *(
        "--domain.train.max_steps",
        "4",
        "--domain.train.batch_tokens",
        "256",
        "--domain.train.micro_batch_tokens",
        "256",
    ),
    *("--task.train.max_steps", "4", "--task.train.batch_tokens", "256", "--task.train.micro_batch_tokens", "256"),
    *("--domain.train.max_dev_tokens", "256", "--task.train.max_dev_tokens", "256"),
    # large steps: four of them have to change answers
    *("--domain.train.learning_rate", "0.004", "--task.train.learning_rate", "0.004"),
    # a task adapter on the base is its own baseline
    *("--task.on", "base", "--base.dtype", "float32", "--run.trackers", "none"),
)
SCORED = (
    *("--evaluate.max_heldout_documents", "6", "--evaluate.resamples", "100", "--evaluate.max_new_tokens", "16"),
    *("--evaluate.generated_answers", "8", "--task.on", "base", "--base.dtype", "float32"),
)
NEW_TOKENS = 16
PATIENCE = 900.0


def asked(tokenizer: Any, questions: Sequence[str] = QUESTIONS) -> list[list[int]]:
    return [chat.prompt_ids(tokenizer, {"question": question}, SYSTEM) for question in questions]


@unittest.skipUnless(WANTED and PYTHON.is_file(), REASON)
class EmbeddedModel(unittest.TestCase):
    """SmolLM2-135M with adapters of a few steps, in float32."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.root, cls.models = temporary_directory(), embedded_models()
        cls.flags = ["--run.data_dir", str(cls.root / "data"), "--run.models_dir", str(cls.models)]
        last_json(script("prepare_data", *cls.flags, *SHORT))
        found = {
            stage: last_json(script(f"train_{stage}_adapter", *cls.flags, *FEW_STEPS)) for stage in ("domain", "task")
        }
        section = settings.smollm2_135m().base.model_copy(update={"dtype": "float32"})
        cls.base, cls.section = sources.fetch(section, cls.models), section
        parts = {name: adapter_files.load(Path(run["run"]) / "adapter", cls.base) for name, run in found.items()}
        cls.rows: dict[str, Factors | None] = {"base": None, **parts}
        cls.rows["composed"] = compose([parts["domain"], parts["task"]], Recipe())

    def tearDown(self) -> None:
        self.assertEqual((owned_by(self.models), left_in(self.models)), ([], []))

    def local(self) -> dict[str, list[generation.GeneratedAnswer]]:
        """Each row's answers in this process, one by one, so that padding rounds nothing."""
        model = loading.load_model(self.base, self.section)
        tokenizer = chat.load_tokenizer(self.base.directory)
        model = inference_layers.attach(model, {name: f for name, f in self.rows.items() if f}).eval()
        found = {}
        for name, factors in self.rows.items():
            inference_layers.select(model, {name: 1.0} if factors else {})
            answers = [
                generation.answer(model, tokenizer, [ids], max_new_tokens=NEW_TOKENS)[0] for ids in asked(tokenizer)
            ]
            found[name] = answers
        return found

    def seconds_of(self, count: int) -> float:
        """How long this process takes for as many answers, eight at once as `evaluate` and `inference` ask."""
        model = loading.load_model(self.base, self.section)
        model = inference_layers.attach(model, {"composed": self.rows["composed"]}).eval()
        examples = [{"question": f"What does the function number {n} of shlex do?"} for n in range(count)]
        began = time.monotonic()
        how = InferenceSection(max_new_tokens=NEW_TOKENS)
        generation.answer_all(model, chat.load_tokenizer(self.base.directory), examples, SYSTEM, how)
        return time.monotonic() - began

    def test_one_server_answers_for_every_row_as_this_process_does(self) -> None:
        prompts = asked(chat.load_tokenizer(self.base.directory))
        how = InferenceSection(engine="vllm", max_new_tokens=NEW_TOKENS)
        needs = {"rank": rank_of(list(self.rows.values())), "positions": positions_of(prompts, NEW_TOKENS)}
        with ServedModel(self.base, self.section, how, models_dir=self.models, **needs) as model:
            served = {name: model.answers(prompts, name, factors, name) for name, factors in self.rows.items()}
            pieces: list[str] = []
            streamed = model.stream(prompts[0], "composed", self.rows["composed"], pieces.append)
            many = asked(model.tokenizer, [f"What does the function number {n} of shlex do?" for n in range(48)])
            began = time.monotonic()
            model.answers(many, "composed", self.rows["composed"], "many")
            seconds = {"engine": time.monotonic() - began}
        local = self.local()
        seconds["local"] = self.seconds_of(len(many))
        # no claim of a test: what docs/benchmarks.md says was read off here
        print({name: f"{len(many) / taken:.2f} answers/s" for name, taken in seconds.items()})
        pairs = [(a, b) for name in self.rows for a, b in zip(served[name], local[name], strict=True)]
        equal = sum(a == b for a, b in pairs)
        print(f"{equal} of {len(pairs)} greedy answers are equal")
        self.assertGreaterEqual(equal, len(pairs) - 1, [pair for pair in pairs if pair[0] != pair[1]])
        for name in ("domain", "task", "composed"):
            self.assertNotEqual([a.text for a in served[name]], [a.text for a in served["base"]], name)
        self.assertEqual((streamed, "".join(pieces)), (served["composed"][0], streamed.text))

    def test_evaluation_says_the_same_of_generated_answers(self) -> None:
        tables = {}
        for engine in ("local", "vllm"):
            done = last_json(script("evaluate", *self.flags, *SCORED, "--inference.engine", engine))
            tables[engine] = files.read_json(Path(done["run"]) / "results.json")["cells"]
        self.assertEqual(set(tables["local"]), {"base", "domain", "task", "composed"})
        for cell, local in tables["local"].items():
            served, count = tables["vllm"][cell], local["format"]["answers"]
            print(cell, {name: (local[name], served[name]) for name in ("em", "f1", "answer_nll")})
            self.assertEqual(served["format"]["answers"], count)
            self.assertEqual(served["answer_nll"], local["answer_nll"], "scoring is ours")
            for measure in ("em", "f1"):
                self.assertLessEqual(abs(served[measure] - local[measure]), 1 / count + 1e-9, (cell, measure))

    def test_commands_of_the_page_serve_the_composed_adapter_and_the_merged_model(self) -> None:
        merged = self.root / "merged"
        last_json(script("inference", *self.flags, *FEW_STEPS, "--merge_path", str(merged)))
        adapter_files.save(self.root / "adapter", of_one_rank(self.rows["composed"]), self.base)
        expected = self.local()["composed"]
        tokenizer = chat.load_tokenizer(self.base.directory)
        for command, served in zip(page_commands(), ("mine", "models/merged_model"), strict=True):
            port = server_process.free_port()
            words = [*shlex.split(command), "--dtype", "float32", "--port", str(port)]
            words = [str(ROOT / word) if word.startswith(".venvs/") else word for word in words]
            places = {"models/composed/RUN/adapter": str(self.root / "adapter"), "models/merged_model": str(merged)}
            places["models/base/smollm2-135m-instruct-from-q4_1"] = str(self.base.directory)
            for name, place in places.items():
                words = [word.replace(name, place) for word in words]
            with self.subTest(command), server_of(words, port, self.root):
                name = served.replace("models/merged_model", str(merged))
                equal = 0
                for ids, answer in zip(asked(tokenizer), expected, strict=True):
                    body = {"model": name, "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0}
                    equal += posted(port, body)["choices"][0]["text"].strip() == answer.text.strip()
                self.assertGreaterEqual(equal, len(expected) - 1)

    def test_command_killed_in_the_middle_takes_its_server_along(self) -> None:
        prompts = self.root / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"Tell me about {n}."}) + "\n" for n in range(400)))
        target = self.root / "answers.jsonl"
        command = [sys.executable, "scripts/inference.py", *self.flags, "--inference.engine", "vllm"]
        command += [*FEW_STEPS, "--prompts_file", str(prompts), "--output_file", str(target)]
        partial = target.with_name(f".{target.name}.partial.jsonl")
        for number, kind in ((signal.SIGKILL, "killed"), (signal.SIGINT, "interrupted")):
            with self.subTest(kind):
                started = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stderr=subprocess.DEVNULL)
                before = lines_of(partial)
                wait(lambda before=before: lines_of(partial) > before, started)
                self.assertGreaterEqual(len(owned_by(self.models)), 3)
                started.send_signal(number)
                started.wait(60)
                until(lambda: not owned_by(self.models), "the server outlives its command")
        self.assertEqual(left_in(self.models), [])
        self.assertFalse(target.exists())


@unittest.skipUnless(WANTED and PYTHON.is_file(), REASON)
class ToyLlama(unittest.TestCase):
    """A Llama with heads of 64: fast to start, so every refusal of a real server is seen here."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.models = temporary_directory()
        cls.base, cls.factors = toy_llama(0)
        cls.other, _ = toy_llama(1)
        cls.prompts = [[5, 6, 7, number] for number in range(24)]

    def tearDown(self) -> None:
        self.assertEqual((owned_by(self.models), left_in(self.models)), ([], []))

    def engine(self, base: BaseModel, url: str = "") -> Engine:
        how = InferenceSection(engine="openai" if url else "vllm", engine_url=url)
        return Engine(base, FLOAT32, how, EngineNeeds(64, 4), self.models)

    @contextmanager
    def running(self, *words: str, updating: str = "1") -> Iterator[str]:
        """A server that somebody else started."""
        port = server_process.free_port()
        command = [str(PYTHON), "-m", vllm_command.MODULE, "--model", str(self.base.directory), "--dtype", "float32"]
        command += ["--enforce-eager", "--max-model-len", "64", "--host", "127.0.0.1", "--port", str(port), *words]
        with server_of(command, port, self.models, VLLM_ALLOW_RUNTIME_LORA_UPDATING=updating):
            yield f"http://127.0.0.1:{port}"

    def test_token_ids_are_those_of_this_process_attached_and_started_on_a_port_in_use(self) -> None:
        model = loading.load_model(self.base, FLOAT32)
        model = inference_layers.attach(model, {"adapter": self.factors}).eval()
        expected = {}
        for name, weights in (("", {}), ("adapter", {"adapter": 1.0})):
            inference_layers.select(model, weights)
            with torch.no_grad():
                expected[name] = [greedy(model, prompt, 8) for prompt in self.prompts]
        with self.running("--enable-lora", "--max-lora-rank", "8") as url:
            with self.engine(self.base, url) as found:
                self.compare(found, expected)
                with self.assertRaisesRegex(EngineError, "no model or adapter not-there"):
                    found.ask(self.prompts, lambda _: Sampling(4, ()), "not-there")
            listed = json.loads(urllib.request.urlopen(f"{url}/v1/models").read())["data"]
            self.assertEqual(len(listed), 1, "the adapter is still there")
            with self.engine(self.other, url) as found, self.assertRaisesRegex(EngineError, "the server's model is"):
                found.start()
            how = InferenceSection(engine="openai", engine_url=url)
            longer = Engine(self.base, FLOAT32, how, EngineNeeds(65), self.models)
            with longer, self.assertRaisesRegex(EngineError, "65 tokens, the server has 64"):
                longer.start()
            ports = iter([int(url.rpartition(":")[2]), server_process.free_port()])
            given = mock.patch.object(server_process, "free_port", side_effect=lambda: next(ports))
            with given, self.engine(self.base) as found:
                self.compare(found, expected)
                for process in owned_by(self.models):
                    words = " ".join(cmdline(process))
                    if vllm_command.MODULE in words and "server_guard" not in words:
                        process.kill()
                with self.assertRaisesRegex(EngineError, "ended while it was asked|connection to the server was lost"):
                    found.ask(self.prompts, lambda _: Sampling(8, ()))

    def compare(self, found: Engine, expected: dict[str, list[list[int]]]) -> None:
        served = {"": "", "adapter": found.load("adapter", self.factors, self.prompts[0])}
        for name, local in expected.items():
            answers = found.ask(self.prompts, lambda _: Sampling(8, ()), served[name])
            equal = sum(a == b for a, b in zip(answers, local, strict=True))
            print(f"toy Llama, {name or 'base'}: {equal} of {len(local)} equal")
            self.assertGreaterEqual(equal, len(local) - 1)

    def test_server_without_the_route_and_server_without_lora(self) -> None:
        for updating, said in (("1", "LoRA is switched off"), ("0", "has no /v1/load_lora_adapter")):
            with (
                self.subTest(said),
                self.running(updating=updating) as url,
                self.engine(self.base, url) as found,
                self.assertRaisesRegex(EngineError, said),
            ):
                found.load("adapter", self.factors, self.prompts[0])


@unittest.skipUnless(WANTED and PYTHON.is_file(), REASON)
class Parser(unittest.TestCase):
    def test_vllms_own_parser_takes_the_commands_for_minimax_m2(self) -> None:
        found = [
            words for words in shlex_commands() if words[:2] == ["vllm", "serve"] and "--tensor-parallel-size" in words
        ]
        self.assertGreaterEqual(len(found), 4)
        program = (
            "import sys, json\n"
            "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
            "from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args\n"
            "for words in json.loads(sys.argv[1]):\n"
            "    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words)\n"
            "    validate_parsed_serve_args(parsed)\n"
        )
        words = json.dumps([command[2:] for command in found])
        done = subprocess.run([str(PYTHON), "-c", program, words], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, however slow the machine is."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)


def toy_llama(seed: int) -> tuple[BaseModel, Factors]:
    torch.manual_seed(seed)
    tokenizer = toy.tiny_tokenizer()
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    directory = temporary_directory() / f"llama-{seed}"
    model = LlamaForCausalLM(shape)
    with logger.quiet_transformers():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    base = sources.fetch(BaseModelSection(source=str(directory), dtype="float32"), directory.parent)
    return base, random_factors(model, ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], 4, 8, seed=seed, size=0.2)


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Token ids, one after the other, without a cache and without an end."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def page_commands() -> list[str]:
    """The commands of docs/serving.md that start vLLM for the embedded model, as printed."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    joined = text.replace("\\\n", " ")
    return re.findall(r"(?m)^ *(?:VLLM\S+ )?(\.venvs/vllm/bin/python -m vllm\.\S+ --model .*)$", joined)


def shlex_commands() -> list[list[str]]:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"(?m)^ *(vllm serve .*)$", text)]


@contextmanager
def server_of(words: Sequence[str], port: int, home: Path, **environment: str) -> Iterator[None]:
    """A server, ready, ended with all it started."""
    given = {**clean_environment(), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **environment}
    with (home / "server.log").open("wb") as log:
        started = subprocess.Popen(words, cwd=ROOT, env=given, stdout=log, stderr=log, start_new_session=True)
    try:
        wait(lambda: is_healthy(port), started, (home / "server.log"))
        yield
    finally:
        children = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        for child in children:
            if child.is_running():
                child.kill()


def wait(condition: Any, process: subprocess.Popen[bytes], log: Path | None = None) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            said = log.read_text(errors="replace")[-3000:] if log else ""
            raise AssertionError(f"it ended ({process.poll()}), or took too long: {said}")
        time.sleep(0.2)


def is_healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def posted(port: int, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=PATIENCE).read())


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


if __name__ == "__main__":
    unittest.main()
