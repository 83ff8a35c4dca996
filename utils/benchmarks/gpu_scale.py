"""The gpu suite's shapes, and what follows by arithmetic: what fits, and the whole model from a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from config import ATTENTION, LoraSection, PlanSection
from utils.exceptions import ConfigError, Problem
from utils.models.architectures import minimax_m2
from utils.models.model_shapes import GIB, Dtype, ModelSizes
from utils.models.process_layout import ProcessLayout
from utils.planning import estimates, hardware, pass_times, training_plan
from utils.planning.estimates import TrainingStep

# of the memory that is free, what a prediction may take: the rest is for what no arithmetic knows
ROOM = 0.92
# the whole model on one node of eight
GPUS = 8


@dataclass(frozen=True)
class SuiteScale:
    """The shapes of the suite. `most_layers` is for MiniMax-M2; `dense` and `moe` are settings of transformers."""

    moe: dict[str, Any]
    dense: dict[str, Any]
    most_layers: int
    sequence_tokens: int
    dense_tokens: int
    """Tokens of a row of the dense model; a step has eight of them, a forward pass four."""
    attention: LoraSection
    experts: LoraSection


def _shape(**changed: Any) -> dict[str, Any]:
    return {key: value for key, value in minimax_m2.PUBLISHED.items() if key != "quantization_config"} | changed


REAL = SuiteScale(
    moe=_shape(),
    dense={  # the shapes of Llama 3.2 1B
        **{"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"intermediate_size": 8192, "vocab_size": 128_256, "tie_word_embeddings": True},
    },
    most_layers=16,
    sequence_tokens=4096,
    dense_tokens=2048,
    attention=LoraSection(rank=16, alpha=32, target_modules=ATTENTION),
    experts=LoraSection(rank=8, alpha=16, target_modules=ATTENTION, experts=True),
)
TOY = SuiteScale(
    moe=_shape(
        **{"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 16, "rotary_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 768},
        **{"bos_token_id": 0, "eos_token_id": 1},
    ),
    dense={
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 96, "vocab_size": 768},
    },
    most_layers=2,
    sequence_tokens=128,
    dense_tokens=32,
    attention=LoraSection(rank=4, alpha=8, target_modules=ATTENTION),
    experts=LoraSection(rank=2, alpha=4, target_modules=ATTENTION, experts=True),
)


def most_layers(scale: SuiteScale, lora: LoraSection, free_bytes: float) -> int:
    """The most layers whose training step is predicted to fit. Raises ConfigError when not even one does."""
    for layers in range(scale.most_layers, 0, -1):
        needed = predicted(scale, layers, lora, "bfloat16", careful=True).total
        if needed <= ROOM * free_bytes:
            return layers
    what = f"one layer of MiniMax-M2 takes {needed / GIB:.1f} GiB to train, {free_bytes / GIB:.1f} GiB are free"
    raise ConfigError(Problem(what, fix="free the GPU's memory, or take a larger one"))


def extrapolation(measured: dict[str, Any], tflops: float) -> dict[str, Any]:
    """The whole MiniMax-M2 on eight GPUs (FSDP2, weights sharded) from what its first layers reached on one.

    A layer is assumed to run as fast there, and embeddings and head as efficiently as the layers; the weights of each
    layer are gathered once forward and once backward, either hidden behind the arithmetic or not at all.
    """
    whole, one = sizes(REAL, REAL.moe["num_hidden_layers"]), step(REAL, REAL.attention, "bfloat16")
    node = PlanSection(gpus=GPUS, gpu_tflops=tflops, utilisation=measured["hardware_utilisation"])
    time = pass_times.training_pass(whole, one, ProcessLayout(1, GPUS), hardware.of(node))
    not_hidden, hidden = time.rates(GPUS)
    memory = [estimates.training_memory(whole, one, shards=GPUS, careful=careful).total for careful in (False, True)]
    return {
        "gpus": GPUS,
        "layers": whole.num_layers,
        "tokens_per_second": {
            "hidden": round(hidden, 1),
            "not_hidden": round(not_hidden, 1),
        },
        "gathering_seconds": round(time.sent[pass_times.GATHERS], 3),
        "computing_seconds": round(time.own[pass_times.ARITHMETIC], 3),
        "predicted_gib_per_gpu": [round(size / GIB, 1) for size in memory],
        "measured_to_predicted": measured["measured_to_predicted"],
    }


def sizes(scale: SuiteScale, layers: int) -> ModelSizes:
    """MiniMax-M2's shapes with so many layers."""
    return minimax_m2.sizes({**scale.moe, "num_hidden_layers": layers})


def step(scale: SuiteScale, lora: LoraSection, base: Dtype) -> TrainingStep:
    """One packed row, with activation checkpointing."""
    tokens = scale.sequence_tokens
    return TrainingStep(base, training_plan.adapter(lora), tokens, tokens, packed=True, checkpointing=True)


def predicted(
    scale: SuiteScale, layers: int, lora: LoraSection, base: Dtype, *, careful: bool = False
) -> estimates.TrainingMemory:
    """What such a step takes of one GPU."""
    return estimates.training_memory(sizes(scale, layers), step(scale, lora, base), careful=careful)
