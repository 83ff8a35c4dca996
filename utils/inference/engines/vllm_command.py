"""How vLLM is started for a base model, the adapters that it will get, and the GPUs that are there.

vLLM pins other versions of transformers and torch than this project, so it has an environment of its own. The module
form is used: of its CPU build the command `vllm` does not start (0.32).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from config import BaseModelSection, PlanSection
from utils.artifacts import files
from utils.exceptions import ArtefactError, EngineError, Problem
from utils.models import devices
from utils.models.base_model import BaseModel
from utils.models.model_shapes import GIB
from utils.models.weights import fp8
from utils.planning import estimates, hardware, stage_costs
from utils.planning.memory import count_parameters

ROOT = Path(__file__).resolve().parents[3]
PYTHON = Path(".venvs/vllm/bin/python")
MODULE = "vllm.entrypoints.openai.api_server"
# what the base model is called in requests
BASE = "base"
# GiB for keys and values on a CPU, where vLLM would take a share of the whole memory
CPU_CACHE_GIB = "2"


@dataclass(frozen=True)
class EngineNeeds:
    """What a server has to be started for: tokens of the longest prompt and its answer (0: not known before), and the
    largest rank of an adapter (0 without any)."""

    positions: int = 0
    rank: int = 0


def python_of(engine_python: str) -> Path:
    """The Python that has vLLM. Raises EngineError where it is not there."""
    python = Path(engine_python) if engine_python else ROOT / PYTHON
    if python.is_file():
        return python.absolute()  # not resolved: a virtual environment is known by the link
    fix = (
        "make serving-test builds .venvs/vllm with the CPU build; on GPUs: python -m venv .venvs/vllm, then "
        ".venvs/vllm/bin/python -m pip install vllm; or --inference.engine_python PYTHON, or --inference.engine local"
    )
    raise EngineError(Problem("there is no Python with vLLM", str(python), fix))


def words(python: Path, base: BaseModel, section: BaseModelSection, needs: EngineNeeds, port: int) -> list[str]:
    """The command. Raises EngineError when the GPUs here cannot hold the model."""
    command = [str(python), "-m", MODULE, "--model", str(base.directory.resolve()), "--served-model-name", BASE]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", str(devices.compute_dtype(section.dtype)).removeprefix("torch.")]
    # neither sampling nor ends of the model's own: every request says its own
    command += ["--generation-config", "vllm", "--max-model-len", str(needs.positions or "auto")]
    command += parallel(base, with_adapters=bool(needs.rank))
    if needs.rank:
        command += ["--enable-lora", "--max-lora-rank", str(stage_costs.vllm_rank(needs.rank))]
    return command


def environment(key: str, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the server sees: adapters may be loaded while it runs, its key, and nothing sent to anybody."""
    usual = {"VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB, "OMP_WAIT_POLICY": "PASSIVE"}
    # what tells our own processes apart is not the server's
    kept = {name: value for name, value in given.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    fixed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": key, "HF_HUB_OFFLINE": "1"}
    # rotations are computed as far as rows go; a table of positions is looked at before (`served_model`)
    fixed |= {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    return usual | kept | fixed | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}


def parallel(base: BaseModel, *, with_adapters: bool) -> list[str]:
    """How the model is split over the GPUs of this machine, as `scripts/plan.py` says; on a CPU it is not compiled."""
    if devices.device().type != "cuda":
        return ["--enforce-eager"]
    memory = torch.cuda.get_device_properties(0).total_memory
    plan = PlanSection(gpus=torch.cuda.device_count(), gpu_memory_gib=memory / GIB, headroom_gib=0)
    return parallel_on(base, plan, with_adapters=with_adapters)


def parallel_on(base: BaseModel, plan: PlanSection, *, with_adapters: bool) -> list[str]:
    """The same for planned GPUs. Raises EngineError when they cannot hold the model."""
    size = sum(path.stat().st_size for path in base.directory.glob("*.safetensors"))
    settings = files.read_object(base.directory / "config.json")
    has_experts = False
    try:
        sizes = count_parameters.of_settings(settings)
        has_experts = bool(sizes.experts)
        size = estimates.weight_bytes(sizes, "fp8" if fp8.is_fp8(settings) else "bfloat16")
    except (ArtefactError, ValueError, KeyError, AttributeError, TypeError):
        pass  # an architecture that cannot be counted: its files say how large it is
    gpus = stage_costs.tensor_parallel(size, hardware.of(plan))
    if gpus > plan.gpus:
        what = (
            f"the model takes {size / GIB:,.0f} GiB: {gpus} GPUs of {plan.gpu_memory_gib:.0f} GiB, {plan.gpus} are here"
        )
        fix = "start it elsewhere and attach: --inference.engine openai --inference.engine_url http://HOST:8000"
        raise EngineError(Problem(what, str(base.directory), fix))
    return stage_costs.vllm_parallel(gpus, has_experts=has_experts, with_adapters=with_adapters)
