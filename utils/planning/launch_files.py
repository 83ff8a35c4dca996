"""Which file of scripts/launch/ is for planned hardware, and the command that trains a stage with it. No torch here."""

from __future__ import annotations

from config import Config, PlanSection
from utils.flags import arguments
from utils.models.architectures import registry
from utils.models.model_shapes import ModelSizes

LAUNCH = "scripts/launch"
STAGES = {"domain": "scripts/train_domain_adapter.py", "task": "scripts/train_task_adapter.py"}
SECTIONS = ("base", "domain", "task", "inputs", "run")
# from this memory on, a GPU is one of the 141 GB kind
LARGE_GPU_GIB = 100


def launch_file(plan: PlanSection, *, sharded: bool) -> str:
    """The file of scripts/launch/ for this hardware."""
    if sharded:
        size = "8x141gb" if plan.gpu_memory_gib >= LARGE_GPU_GIB else "8x80gb"
        return f"{LAUNCH}/minimax_m2_{'2x8' if plan.nodes > 1 else size}.yaml"
    if plan.nodes > 1:
        return f"{LAUNCH}/several_nodes.yaml"
    return f"{LAUNCH}/{'one_gpu' if plan.gpus == 1 else 'one_node'}.yaml"


def command(config: Config, sizes: ModelSizes, stage: str, *, sharded: bool) -> str:
    """The exact command that trains a stage on this hardware."""
    plan = config.plan
    file = launch_file(plan, sharded=sharded)
    words = ["accelerate launch", f"--config_file {file}"]
    if plan.nodes > 1:
        words.append("--machine_rank RANK --main_process_ip ADDRESS")
    usual = {"one_gpu.yaml": 1, "several_nodes.yaml": 16, "minimax_m2_2x8.yaml": 16}
    if plan.nodes * plan.gpus != usual.get(file.rpartition("/")[2], 8) or plan.nodes > 2:
        words.append(f"--num_machines {plan.nodes} --num_processes {plan.nodes * plan.gpus}")
    if sharded and not registry.of(sizes.model_type).in_launch_files:
        words.append(f"--fsdp_transformer_layer_cls_to_wrap {sizes.layer_class}")
    return " ".join([*words, STAGES[stage], *arguments(config, SECTIONS)])
