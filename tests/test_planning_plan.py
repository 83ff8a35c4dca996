"""Planning before loading: the script, the refusals, dry runs of every script, and the launch files it names."""

from __future__ import annotations

import os
import runpy
import subprocess
import unittest
from pathlib import Path
from typing import ClassVar
from unittest import mock

import torch

from config import ATTENTION, AUTO, PRESETS, BaseModelSection, Config, LoraSection
from tests.support import (
    ROOT,
    Workspace,
    forked,
    last_json,
    saved_model,
    temporary_directory,
    toy,
)
from utils import cli
from utils.adapters import peft_model
from utils.artifacts import files
from utils.exceptions import ArtefactError, ConfigError
from utils.models.architectures import minimax_m2
from utils.models.model_shapes import GIB
from utils.planning import dry_run, fitting_settings, hardware, plan_report, planned_data, preflight, stage_commands
from utils.planning.preflight import Machine
from utils.training import training_run

M2 = minimax_m2.sizes(minimax_m2.PUBLISHED)
LAUNCH = ROOT / "scripts" / "launch"
SHARDED = sorted(LAUNCH.glob("minimax_m2_*.yaml"))
# `runs` is about what lies on the disk, not about a model
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem not in ("__init__", "runs"))


HARDWARE = (
    [],
    ["--plan.gpu_memory_gib=141"],
    ["--plan.nodes=2"],
    ["--plan.gpus=1"],
    ["--plan.gpus=4"],
    ["--plan.nodes=3"],
    ["--plan.nodes=2", "--plan.gpus=4"],
)


def resolve(*arguments: str) -> Config:
    return cli.resolve(["--preset", "minimax_m2", *arguments], {})


class Script(unittest.TestCase):
    def test_plan_counts_minimax_m2_offline_and_names_file_and_command(self) -> None:
        places = ["--run.data_dir", str(temporary_directory()), "--run.models_dir", str(temporary_directory())]
        done = forked("plan", "--preset", "minimax_m2", "--plan.gpu_memory_gib", "141", *places)
        found = last_json(done)
        self.assertIn("the hub cannot be reached", done.stderr)
        self.assertEqual(found["parameters"], 228_689_748_992)
        domain = found["stages"]["domain"]
        self.assertEqual((domain["trainable_parameters"], domain["verdict"]), (26_411_008, "fits"))
        self.assertEqual(
            domain["command"],
            "accelerate launch --config_file scripts/launch/minimax_m2_8x141gb.yaml scripts/train_domain_adapter.py "
            "--preset minimax_m2 --base.fp8=dequantise --domain.train.micro_batch_tokens=32768 "
            f"--run.data_dir={places[1]} --run.models_dir={places[3]} --run.expert_parallel=off",
        )
        for words in ("2,756,902,912", "refused: adapters on FP8 experts", "host memory while loading: 73.0 GiB"):
            self.assertIn(words, done.stdout + str(found))

    def test_a_dense_model_is_planned_from_its_own_directory_and_fits_whole(self) -> None:
        directory = saved_model("llama").directory
        config = cli.resolve([f"--base.source={directory}"], {})
        found = preflight.exact(config.base, config.run.models_dir)
        lines, facts = plan_report.report(config, found, planned_data.of(config))
        self.assertEqual(facts["stages"]["domain"]["verdict"], "fits")
        self.assertIn("scripts/launch/one_node.yaml", "\n".join(lines))
        self.assertNotIn("with the experts", "\n".join(lines))

    def test_what_no_transformers_class_describes_is_an_error_with_a_reason(self) -> None:
        directory = temporary_directory()
        (directory / "config.json").write_text('{"model_type": "no_such_model"}')
        with self.assertRaisesRegex(ArtefactError, "cannot be counted"):
            preflight.exact(BaseModelSection(source=str(directory)), directory)

    def test_every_change_that_is_proposed_is_one_that_exists_and_fits(self) -> None:
        for flags in (
            ["--domain.lora.experts=true", "--run.expert_parallel=off"],
            ["--domain.train.gradient_checkpointing=0", "--run.expert_parallel=off"],
            ["--plan.nodes=2", "--plan.gpu_memory_gib=48", "--run.expert_parallel=off"],
        ):
            config = resolve(*flags)
            (change,) = plan_report.changes(config, M2)
            settings, _, outcome = change.partition(": ")
            self.assertTrue(outcome.endswith(("fits", "tight")), change)
            again = resolve(*flags, *settings.split())
            self.assertNotEqual(fitting_settings.find(again, M2).verdict, "no", flags)
        for other in plan_report.changes(resolve("--plan.gpus=4"), M2)[1:]:
            flags = other[other.index("(") + 1 : other.index(")")].split()
            self.assertNotEqual(fitting_settings.find(resolve(*flags), M2).verdict, "no", other)
        self.assertEqual(plan_report.changes(resolve("--plan.gpu_memory_gib=141"), M2), [])


class Refusals(unittest.TestCase):
    def test_training_minimax_m2_here_is_refused_before_anything_is_fetched(self) -> None:
        models = temporary_directory()
        with mock.patch.object(preflight.sources, "fetch") as fetch, self.assertRaises(ArtefactError) as caught:
            preflight.start(resolve("--run.models_dir", str(models)))
        fetch.assert_not_called()
        self.assertEqual((caught.exception.exit_code, list(models.iterdir())), (2, []))
        for part in ("228,689,748,992", "426.1 GiB of main memory", "GiB are there", "scripts/plan.py", "--preset"):
            self.assertIn(part, str(caught.exception))

    def test_a_script_that_streams_files_is_not_refused(self) -> None:
        here = mock.Mock(digest="")
        with (
            mock.patch.object(preflight.sources, "fetch", return_value=here) as fetch,
            mock.patch.object(preflight.base_checks, "check"),
        ):
            self.assertIs(preflight.start(resolve(), loads_model=False), here)
        fetch.assert_called_once()

    def test_memory_is_compared_process_by_process(self) -> None:
        node = {"local": 8, "host_bytes": 2048 * GIB}
        sharded = Machine(shards=8, gpu_bytes=79 * GIB, **node)
        cases = {
            "fits, sharded over 8 GPUs": (sharded, []),
            "each of 8 GPUs holds all": (Machine(shards=1, gpu_bytes=79 * GIB, **node), ["main memory for 8", "GPU"]),
            "one GPU of 141 GB": (Machine(shards=1, local=1, gpu_bytes=140 * GIB, host_bytes=2048 * GIB), ["GPU"]),
            "4 GPUs": (Machine(shards=4, local=4, gpu_bytes=79 * GIB, host_bytes=2048 * GIB), ["GPU"]),
            "a host for what passes": (Machine(shards=8, local=8, gpu_bytes=79 * GIB, host_bytes=96 * GIB), []),
            "a small host": (Machine(shards=8, local=8, gpu_bytes=79 * GIB, host_bytes=48 * GIB), ["main memory"]),
            "a CPU that has it": (Machine(shards=1, local=1, gpu_bytes=0, host_bytes=512 * GIB), []),
            "two CPU processes share it": (Machine(shards=2, local=2, gpu_bytes=0, host_bytes=480 * GIB), []),
            "which takes both parts": (
                Machine(shards=2, local=2, gpu_bytes=0, host_bytes=400 * GIB),
                ["main memory"],
            ),
            "two such processes": (
                Machine(shards=1, local=2, gpu_bytes=0, host_bytes=512 * GIB),
                ["main memory for 2"],
            ),
        }
        for name, (machine, places) in cases.items():
            with self.subTest(name):
                found = [problem.what for problem in preflight.refusals(M2, "bfloat16", machine)]
                self.assertEqual(len(found), len(places))
                for what, place in zip(found, places, strict=True):
                    self.assertIn(f"of {place}", what)

    def test_float32_is_told_that_half_would_do(self) -> None:
        machine = Machine(shards=1, local=1, gpu_bytes=0, host_bytes=600 * GIB)
        (problem,) = preflight.refusals(M2, "float32", machine)
        self.assertIn("--base.dtype bfloat16", problem.fix)

    def test_peft_adapting_more_than_asked_and_a_router_by_name_are_refused(self) -> None:
        import peft

        real = peft.get_peft_model

        def widened(model: torch.nn.Module, settings: peft.LoraConfig, **names: str) -> torch.nn.Module:
            settings.target_parameters = ["mlp.gate.weight"]
            return real(model, settings, **names)

        lora = LoraSection(rank=2, target_modules=("q_proj",))
        with (
            mock.patch("peft.get_peft_model", widened),
            self.assertRaisesRegex(ArtefactError, "other modules than asked"),
        ):
            peft_model.attach(toy.tiny_minimax_m2()[0], "task", lora)
        router = LoraSection(rank=2, target_modules=("gate",))
        with self.assertRaisesRegex(ArtefactError, "gate: the base model has no such module"):
            peft_model.attach(toy.tiny_minimax_m2()[0], "task", router)
        with self.assertRaisesRegex(ArtefactError, "no fused experts"):
            peft_model.attach(toy.tiny_llama()[0], "task", LoraSection(experts=True))

    def test_more_trainable_parameters_than_asked_for_stop_the_run(self) -> None:
        model, _ = toy.tiny_minimax_m2()
        base = saved_model("minimax_m2")
        config = cli.resolve(["--preset", "tiny_minimax_m2"], {})
        model = training_run.new_adapter(model.requires_grad_(False), "domain", config.domain.lora, 0)
        preflight.check_trainable(model, config, "domain", base)
        model.get_base_model().model.layers[0].mlp.gate.weight.requires_grad_(True)
        with self.assertRaisesRegex(ArtefactError, "parameters are trainable, the domain adapter's settings ask for"):
            preflight.check_trainable(model, config, "domain", base)


class Settings(unittest.TestCase):
    def problem(self, *arguments: str) -> str:
        with self.assertRaises(ConfigError) as caught:
            resolve(*arguments)
        return str(caught.exception)

    def test_what_peft_would_widen_is_refused_before_anything_loads(self) -> None:
        for stage in ("domain", "task"):
            for target in ("all-linear", ".*[.]0[.]self_attn[.]q_proj", "gate", "lm_head"):
                self.assertIn(repr(target), self.problem(f'--{stage}.lora.target_modules=["{target}"]'))
            for target in ("w1,w2,w3", "experts", "gate_up_proj", "q_proj,down_proj"):
                found = self.problem(f"--{stage}.lora.target_modules={target}")
                self.assertIn(f"--{stage}.lora.experts true", found)

    def test_experts_take_no_dropout_and_all_problems_come_together(self) -> None:
        flags = ["--task.lora.experts=true", "--task.lora.dropout=0.1", "--domain.lora.target_modules=w1"]
        found = self.problem(*flags)
        for part in ("task.lora.dropout 0.1", "domain.lora.target_modules w1"):
            self.assertIn(part, found)
        self.assertIn("headroom_gib 99 leaves nothing", self.problem("--plan.headroom_gib=99"))
        experts = resolve("--task.lora.experts=true")
        self.assertEqual((experts.task.lora.experts, experts.task.lora.target_modules), (True, ATTENTION))

    def test_a_model_of_another_name_keeps_its_targets(self) -> None:
        self.assertEqual(cli.resolve(["--base.source", "some/llama"], {}).task.lora.target_modules, (AUTO,))


class DryRun(unittest.TestCase):
    EXPECTED: ClassVar = {
        "prepare_data": "230.1 GB",
        "train_domain_adapter": "train 26,411,008 at rank 16",
        "train_task_adapter": "accelerate launch --config_file scripts/launch/minimax_m2_8x80gb.yaml",
        "compose": "59.2 GiB of main memory",
        "inference": "scripts/inference.py --prompts_file",
        "evaluate": "scripts/evaluate.py --evaluate.controls",
        "benchmark": "426.1 GiB of memory in bfloat16",
        "rollout": "4 GPUs in fp8 (214.3 GiB)",
        "verify": "230.1 GB",
        "plan": "refused: adapters on FP8 experts",
    }

    def test_every_script_says_what_minimax_m2_takes(self) -> None:
        for script, part in self.EXPECTED.items():
            with self.subTest(script):
                config = resolve(*(["--rollout.command=start"] if script == "rollout" else []))
                told = runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))["plan"](config)
                self.assertIn("228,689,748,992 parameters", told[0])
                self.assertIn(part, "\n".join(told))

    def test_every_script_has_its_part(self) -> None:
        for script in SCRIPTS:
            self.assertTrue(dry_run.lines(resolve(), script), script)

    def test_other_models_are_not_spoken_of(self) -> None:
        for name in PRESETS:
            if name.startswith("minimax_m2"):
                continue
            self.assertEqual(dry_run.lines(PRESETS[name](), "train_domain_adapter"), [])

    def test_a_directory_speaks_for_itself(self) -> None:
        directory = saved_model("minimax_m2").directory
        found = dry_run.lines(resolve(f"--base.source={directory}"), "train_domain_adapter")
        self.assertRegex(found[0], r"minimax_m2: \d{2,3},\d{3} parameters")


def told_by(*arguments: str) -> dict[str, str]:
    """What `accelerate launch` tells the processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    parsed = launch_command_parser().parse_args([*arguments, "scripts/train_domain_adapter.py"])
    # another test may be launching something just now
    with mock.patch.dict(os.environ), mock.patch("accelerate.utils.launch.is_port_in_use", return_value=False):
        parsed, _, _ = _validate_launch_command(parsed)
        return prepare_multi_gpu_env(parsed) | {"processes": str(parsed.num_processes)}


class LaunchFiles(unittest.TestCase):
    def test_every_file_is_read_by_accelerate(self) -> None:
        from accelerate.commands.config.config_args import load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        known = vars(launch_command_parser().parse_args(["script.py"])).keys()
        for path in sorted(LAUNCH.glob("*.yaml")):
            with self.subTest(path.name):
                found = load_config_from_file(str(path))
                self.assertEqual(found.mixed_precision, "no")
                self.assertLessEqual(found.fsdp_config.keys(), known)  # accelerate ignores a key it does not know
                self.assertIn("scripts/launch/" + path.name, path.read_text(encoding="utf-8"))

    def test_sharded_files_wrap_the_decoder_layer_and_load_one_copy_a_node(self) -> None:
        self.assertEqual(len(SHARDED), 4)
        for path in SHARDED:
            with self.subTest(path.name):
                told = told_by("--config_file", str(path))
                expected = {
                    "ACCELERATE_USE_FSDP": "true",
                    "FSDP_VERSION": "2",
                    "FSDP_TRANSFORMER_CLS_TO_WRAP": M2.layer_class,
                    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                    "FSDP_RESHARD_AFTER_FORWARD": "true",
                    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
                    "FSDP_ACTIVATION_CHECKPOINTING": "false",
                    "FSDP_OFFLOAD_PARAMS": "false",
                    "processes": "16" if "2x8" in path.name else "8",
                }
                self.assertEqual({name: told.get(name) for name in expected}, expected)

    def test_the_plan_names_files_that_exist_and_flags_that_accelerate_takes(self) -> None:
        named = set()
        dense = preflight.exact(BaseModelSection(source=str(saved_model("llama").directory)), ROOT)
        for sizes in (M2, dense):
            for at in range(3):
                for flags in (
                    [],
                    ["--plan.gpu_memory_gib=141"],
                    ["--plan.nodes=2"],
                    ["--plan.gpus=1"],
                    ["--plan.nodes=3"],
                ):
                    config = resolve(*flags)
                    layouts = hardware.of(config.plan).layouts
                    layout = layouts[min(at, len(layouts) - 1)]
                    command = stage_commands.command(config, sizes, "domain", layout).split()
                    words = command[2 : command.index("scripts/train_domain_adapter.py")]
                    words = ["0" if word == "RANK" else word for word in words]
                    self.assertTrue((ROOT / words[1]).is_file(), words)
                    told = told_by(*words)
                    self.assertEqual(int(told["processes"]), config.plan.nodes * config.plan.gpus, command)
                    if layout.is_sharded and layout.replicate > 1:
                        sizes_of = [f"PARALLELISM_CONFIG_DP_{name}_SIZE" for name in ("REPLICATE", "SHARD")]
                        self.assertEqual([int(told[name]) for name in sizes_of], [layout.replicate, layout.shard])
                    if layout.is_sharded:
                        self.assertEqual(told["FSDP_TRANSFORMER_CLS_TO_WRAP"], sizes.layer_class)
                    named.add(Path(words[1]).name)
        self.assertLessEqual({path.name for path in SHARDED} | {"one_gpu.yaml", "one_node.yaml"}, named)

    def test_the_slurm_script_starts_one_launcher_a_node(self) -> None:
        root = temporary_directory()
        fakes = {
            "bin/scontrol": "echo first\necho second",
            "bin/srun": 'shift\nfor node in 0 1; do SLURM_NODEID=$node "$@"; done',
            ".venv/bin/accelerate": 'echo "$@"',
        }
        for name, text in fakes.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"#!/bin/bash\n{text}\n")
            (root / name).chmod(0o755)
        slurm = {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2"}
        environment = {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", **slurm}
        script, words = str(LAUNCH / "minimax_m2.slurm"), ["scripts/train_domain_adapter.py", "--run.name", "a b"]
        done = subprocess.run(
            ["bash", script, *words], env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        lines = done.stdout.splitlines()
        self.assertEqual(len(lines), 2)
        for node, line in enumerate(lines):
            told = told_by(*(str(ROOT / w) if w.endswith(".yaml") else w for w in line.split()[1:-4]))
            self.assertEqual(
                (told["processes"], f"--machine_rank {node} --main_process_ip first" in line), ("16", True)
            )
            self.assertTrue(line.endswith("scripts/train_domain_adapter.py --run.name a b"))
        empty = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
        self.assertEqual(empty.returncode, 2)


class Records(unittest.TestCase):
    def test_a_training_run_records_predicted_beside_measured_peak_memory(self) -> None:
        place = Workspace()
        place.prepare()
        found = last_json(
            place.run("train_domain_adapter", "--domain.train.max_steps", "2", "--domain.lora.experts", "true")
        )
        measured = files.read_manifest(Path(found["run"]))["measured"]
        self.assertGreater(measured["peak_memory_bytes"], measured["predicted_peak_memory_bytes"])
        self.assertGreater(measured["predicted_peak_memory_bytes"], 4 * 230_000)


if __name__ == "__main__":
    unittest.main()
