"""What a process takes of its machine: threads where nobody chose a number, and no CPU where GPUs were meant."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import unittest
from pathlib import Path
from typing import ClassVar
from unittest import mock

import torch

from tests.support import ROOT, clean_environment, temporary_directory
from utils.exceptions import ConfigError
from utils.models import devices

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import torch
from utils.models import devices
devices.refuse_missing_gpus()
print("threads", devices.set_threads(0))
"""


class Threads(unittest.TestCase):
    def setUp(self) -> None:
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        self.parent = temporary_directory()
        (self.parent / str(os.getppid())).mkdir()
        self.started()

    def started(self, variables: bytes = b"HOME=/x\0", words: bytes = b"accelerate\0launch\0") -> None:
        """How the launcher was started."""
        for name, text in (("environ", variables), ("cmdline", words)):
            (self.parent / str(os.getppid()) / name).write_bytes(text)

    def threads(self, *, cores: int = 8, wanted: int = 0, **environment: str) -> int:
        torch.set_num_threads(1)
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(devices, "PROC", self.parent),
            mock.patch.object(devices, "_cores", return_value=cores),
        ):
            return devices.set_threads(wanted)

    def test_the_launcher_s_own_1_becomes_all_cores_shared_by_the_processes_of_the_node(self) -> None:
        self.assertEqual(self.threads(**LAUNCHED), 8)
        self.assertEqual(self.threads(**LAUNCHED, LOCAL_WORLD_SIZE="3"), 2)
        self.assertEqual(self.threads(**LAUNCHED, LOCAL_WORLD_SIZE="16"), 1)

    def test_what_a_person_chose_stays(self) -> None:
        self.assertEqual(self.threads(**LAUNCHED, wanted=3), 3)
        self.assertEqual(self.threads(**LAUNCHED | {"OMP_NUM_THREADS": "4"}), 1)  # OpenMP has read it already
        self.started(variables=b"HOME=/x\0OMP_NUM_THREADS=1\0")
        self.assertEqual(self.threads(**LAUNCHED), 1)
        self.started(words=b"accelerate\0launch\0--num_cpu_threads_per_process\x001\0")
        self.assertEqual(self.threads(**LAUNCHED), 1)

    def test_python_alone_takes_what_openmp_takes(self) -> None:
        self.assertEqual(self.threads(OMP_NUM_THREADS="1"), 1)
        self.assertEqual(self.threads(), 1)

    def test_where_nothing_tells_how_the_launcher_was_started_the_cores_are_taken(self) -> None:
        self.parent = Path("/nowhere")
        self.assertEqual(self.threads(**LAUNCHED), 8)


class Processes(unittest.TestCase):
    """What is said of a launch on CPUs that is not what it looks like."""

    ONE = "accelerate launch --config_file scripts/launch/cpu.yaml"
    ALONE: ClassVar = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}

    def said(self, cores: int, words: str = "", **environment: str) -> str:
        parent = temporary_directory()
        (parent / str(os.getppid())).mkdir()
        (parent / str(os.getppid()) / "cmdline").write_bytes(words.replace(" ", "\0").encode())
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(devices, "PROC", parent),
            mock.patch.object(devices, "_cores", return_value=cores),
            self.assertLogs("adapters", "WARNING") as logs,
        ):
            logging.getLogger("adapters").warning("-")
            devices.warn_of_processes()
        return " ".join(f"{record.msg} {getattr(record, 'facts', '')}" for record in logs.records[1:])

    def test_one_process_where_several_were_asked_for(self) -> None:
        for words in ("--cpu --num_processes 4", "--num-processes=4 --cpu"):
            found = self.said(2, f"python accelerate launch {words} scripts/evaluate.py", **self.ALONE)
            for part in ("1 process of the 4", "'cores': 2", self.ONE, "cpu_two_processes.yaml --num_processes 2"):
                self.assertIn(part, found)
        found = self.said(1, "accelerate launch --cpu --num_processes 4 x.py", **self.ALONE)
        self.assertIn(self.ONE, found)
        self.assertNotIn("cpu_two_processes", found)

    def test_more_processes_than_cores(self) -> None:
        started = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
        found = self.said(2, "accelerate launch --num_processes 4 x.py", **started)
        self.assertIn("4 processes wait for each other on 2 cores", found)
        self.assertIn(f"--num_processes 2, or {self.ONE}", found)

    def test_nothing_of_what_is_as_it_was_asked(self) -> None:
        one = {name: value for name, value in self.ALONE.items() if name != "MASTER_ADDR"}
        started = {**self.ALONE, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        for cores, words, environment in (
            (2, "accelerate launch --cpu --num_processes 1 x.py", one),
            (2, "accelerate launch --num_processes 2 x.py", started),
            (2, "accelerate launch --num_machines 2 --num_processes 2 x.py", started | {"LOCAL_WORLD_SIZE": "1"}),
            (2, "python tests.py --num_processes 4", {}),
            (2, "bash", {"MASTER_ADDR": "127.0.0.1"}),
            (2, "accelerate launch x.py", self.ALONE),
            (2, "accelerate launch --num_processes many x.py", self.ALONE),
        ):
            self.assertEqual(self.said(cores, words, **environment), "", words)


class Gpus(unittest.TestCase):
    def refused(self, visible: int, **environment: str) -> str:
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(torch.cuda, "device_count", return_value=visible),
        ):
            try:
                devices.refuse_missing_gpus()
            except ConfigError as error:
                return str(error)
            return ""

    def test_eight_processes_for_gpus_that_are_not_there(self) -> None:
        found = self.refused(0, LOCAL_WORLD_SIZE="8")
        for part in ("8 processes", "no GPU is visible", "scripts/launch/cpu.yaml", "ACCELERATE_USE_CPU=true"):
            self.assertIn(part, found)
        self.assertIn("--num_processes 4", self.refused(4, LOCAL_WORLD_SIZE="8"))

    def test_what_was_meant_is_not_refused(self) -> None:
        for visible, environment in (
            (0, {}),
            (0, {"LOCAL_WORLD_SIZE": "1"}),
            (8, {"LOCAL_WORLD_SIZE": "8"}),
            (0, {"LOCAL_WORLD_SIZE": "8", "ACCELERATE_USE_CPU": "true"}),
            (0, {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "-1,-1"}),
        ):
            self.assertEqual(self.refused(visible, **environment), "", environment)

    def test_launch_files_as_accelerate_reads_them(self) -> None:
        program = temporary_directory() / "program.py"
        program.write_text(PROGRAM.format(root=str(ROOT)))
        hidden = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU")
        environment = {name: value for name, value in clean_environment().items() if name not in hidden}
        cores = len(os.sched_getaffinity(0))
        if torch.cuda.device_count():
            self.skipTest("there are GPUs here")
        for file, code, told in (
            ("one_gpu.yaml", 0, f"threads {cores}"),
            ("one_node.yaml", 1, "no GPU is visible here"),
        ):
            command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
            words = ["--config_file", str(ROOT / "scripts" / "launch" / file), "--num_processes"]
            number = "1" if code == 0 else "2"
            done = subprocess.run(
                [*command, *words, number, str(program)],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                cwd=ROOT,
            )
            self.assertEqual(done.returncode, code, done.stderr[-2000:])
            self.assertIn(told, done.stdout + done.stderr)
            self.assertNotIn("num_processes` was set to a value of `0`", done.stderr)


if __name__ == "__main__":
    unittest.main()
