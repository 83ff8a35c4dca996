"""What the launcher's file asks for: how many copies of the model there are, and over how many ranks each is sharded.

Everything is read from the environment that `accelerate launch` sets, once, before a library can act on it: accelerate
and transformers would otherwise empty or wrap a model their own way. No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from utils.exceptions import ConfigError, Problem
from utils.models.process_layout import ProcessLayout

FSDP, MESH = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"
_MESH = "PARALLELISM_CONFIG_"
REPLICATE, SHARD = f"{_MESH}DP_REPLICATE_SIZE", f"{_MESH}DP_SHARD_SIZE"
# what else a launcher can ask for, and would be ignored
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing (it is --domain.train.gradient_checkpointing)",
    "FSDP_IGNORED_MODULES": "fsdp_ignored_modules",
}
_OTHER_MESHES = {
    f"{_MESH}TP_SIZE": "tensor parallelism (parallelism_config_tp_size)",
    f"{_MESH}CP_SIZE": "context parallelism (parallelism_config_cp_size)",
    f"{_MESH}SP_SIZE": "sequence parallelism (parallelism_config_sp_size)",
}
FIX = "use a file of scripts/launch/, or change these lines of yours as they are there"


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks were started."""
    return int(environment.get("WORLD_SIZE", "1"))


_taken: list[ProcessLayout] = []


def current() -> ProcessLayout:
    """The layout of this command."""
    return _taken[-1] if _taken else read(os.environ)


def take() -> ProcessLayout:
    """Read the layout and take it out of the environment. Raises ConfigError for what is asked and not done here."""
    if _taken:
        return _taken[-1]
    layout = read(os.environ)
    for name in (FSDP, MESH):
        os.environ.pop(name, None)
    _taken.append(layout)
    return layout


def share_experts(count: int) -> None:
    """From now on every `count` ranks that follow each other hold each expert once; 1 gathers the experts."""
    layout = replace(take(), expert=count)
    _taken[:] = [layout]


def read(environment: Mapping[str, str]) -> ProcessLayout:
    """The layout that an environment asks for. Raises ConfigError with everything that is not done here."""
    ranks = world_size(environment)
    problems = [
        Problem(f"the launcher asks for {what}, which is not done here", environment[name], FIX)
        for name, what in _REFUSED.items()
        if _says(environment, name) or (name == "FSDP_IGNORED_MODULES" and environment.get(name))
    ]
    sharded, replicate = _says(environment, FSDP), 1
    if _says(environment, MESH):
        problems += [
            Problem(f"the launcher asks for {what}, which is not done here", environment[name], FIX)
            for name, what in _OTHER_MESHES.items()
            if environment.get(name, "1") != "1"
        ]
        replicate, shard = (_size(environment, name, problems) for name in (REPLICATE, SHARD))
        if shard > 1 and not sharded:
            what = "parallelism_config_dp_shard_size is above 1, but the file does not ask for FSDP"
            problems.append(Problem(what, shard, "add distributed_type: FSDP with its fsdp_config, or set it to 1"))
        if not problems and replicate * shard != ranks and (replicate, shard) != (1, 1):
            what = (
                f"parallelism_config_dp_replicate_size {replicate} x dp_shard_size {shard} is not the number of ranks"
            )
            problems.append(Problem(what, ranks, "change them, or num_processes, so that the product is that number"))
    if sharded:
        for name, key, expected in (
            ("FSDP_VERSION", "fsdp_version", "2"),
            ("FSDP_AUTO_WRAP_POLICY", "fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        ):
            if (value := environment.get(name, expected)) != expected:
                problems.append(Problem(f"the launcher's {key} has to be {expected}", value, FIX))
        if (value := environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()) not in ("true", "false"):
            problems.append(Problem("the launcher's fsdp_reshard_after_forward has to be true or false", value, FIX))
    if problems:
        raise ConfigError(problems)
    return ProcessLayout(replicate, ranks // replicate) if sharded and ranks > 1 else ProcessLayout(ranks, 1)


def _size(environment: Mapping[str, str], name: str, problems: list[Problem]) -> int:
    text = environment.get(name, "1")
    if text.isdigit() and int(text) > 0:
        return int(text)
    problems.append(Problem(f"the launcher's {name.lower()} is no number of ranks", text, FIX))
    return 1


def _says(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes", "on")
