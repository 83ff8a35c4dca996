"""Which file of scripts/launch/ is for planned hardware, and the command that runs a stage with it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from config import Config, PlanSection
from utils.flags import arguments
from utils.models.architectures import registry
from utils.models.model_shapes import ModelSizes
from utils.models.process_layout import ProcessLayout

LAUNCH = "scripts/launch"
# from this memory on, a GPU is one of the 141 GB kind
LARGE_GPU_GIB = 100
# processes that a file starts by itself
_TWO_NODES = ("several_nodes.yaml", "minimax_m2_2x8.yaml", "minimax_m2_2x8_hsdp.yaml")
_STARTS = {"one_gpu.yaml": 1} | dict.fromkeys(_TWO_NODES, 16)


@dataclass(frozen=True)
class StageCommand:
    """A script, what is asked of it, and the sections that it reads."""

    script: str
    asks: tuple[str, ...]
    sections: tuple[str, ...]


# the trainings are what a plan chooses settings for; the others run with these
STAGES = ("domain", "task")
COMMANDS = {
    "prepare": StageCommand("prepare_data", (), ("data", "base", "run")),
    "domain": StageCommand("train_domain_adapter", (), ("base", "domain", "inputs", "run")),
    "task": StageCommand("train_task_adapter", (), ("base", "domain", "task", "inputs", "run")),
    "search": StageCommand("compose", ("--compose.search",), ("compose", "evaluate", "inputs", "base", "run")),
    "evaluate": StageCommand("evaluate", ("--evaluate.controls",), ("evaluate", "compose", "inputs", "base", "run")),
    "asking": StageCommand(
        "inference",
        ("--prompts_file", "questions.jsonl", "--output_file", "answers.jsonl"),
        ("inference", "compose", "inputs", "base", "run"),
    ),
    "merge": StageCommand(
        "inference", ("--merge_path", "models/merged_model"), ("merge", "compose", "inputs", "base", "run")
    ),
}


def launch_file(plan: PlanSection, layout: ProcessLayout) -> str:
    """The file of scripts/launch/ for this hardware."""
    if layout.is_sharded and layout.replicate > 1:
        return f"{LAUNCH}/minimax_m2_2x8_hsdp.yaml"
    if layout.is_sharded:
        size = "8x141gb" if plan.gpu_memory_gib >= LARGE_GPU_GIB else "8x80gb"
        return f"{LAUNCH}/minimax_m2_{'2x8' if plan.nodes > 1 else size}.yaml"
    if plan.nodes > 1:
        return f"{LAUNCH}/several_nodes.yaml"
    return f"{LAUNCH}/{'one_gpu' if plan.gpus == 1 else 'one_node'}.yaml"


def command(config: Config, sizes: ModelSizes, stage: str, layout: ProcessLayout | None) -> str:
    """The exact command of a stage with these settings; without a layout it is one Python process."""
    runs = COMMANDS[stage]
    if layout is not None and layout.is_sharded and sizes.expert_plan:
        shared = str(layout.expert) if layout.expert > 1 else "off"
        config = config.model_copy(update={"run": config.run.model_copy(update={"expert_parallel": shared})})
    given = arguments(config, runs.sections)
    own_flags = {word.removeprefix("--").partition("=")[0] for word in runs.asks if word.startswith("--")}
    given = [word for word in given if word.removeprefix("--").partition("=")[0] not in own_flags]
    words = ["python"] if layout is None else _launch(config.plan, sizes, layout)
    return " ".join([*words, f"scripts/{runs.script}.py", *runs.asks, *given])


def _launch(plan: PlanSection, sizes: ModelSizes, layout: ProcessLayout) -> list[str]:
    file = launch_file(plan, layout)
    name = file.rpartition("/")[2]
    words = ["accelerate launch", f"--config_file {file}"]
    if plan.nodes > 1:
        words.append("--machine_rank RANK --main_process_ip ADDRESS")
    if layout.processes != _STARTS.get(name, 8) or plan.nodes > 2:
        words.append(f"--num_machines {plan.nodes} --num_processes {layout.processes}")
    if layout.is_sharded and layout.replicate > 1 and (layout.replicate, layout.shard) != (2, 8):
        sizes_of = f"--parallelism_config_dp_replicate_size {layout.replicate}"
        words.append(f"{sizes_of} --parallelism_config_dp_shard_size {layout.shard}")
    if layout.is_sharded and not registry.of(sizes.model_type).in_launch_files:
        words.append(f"--fsdp_transformer_layer_cls_to_wrap {sizes.layer_class}")
    return words
