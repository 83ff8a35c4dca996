"""Whether an FP8 checkpoint stays FP8 on the GPU while an adapter is trained, or is de-quantised: facts in, choice out.

Native FP8 halves the memory of the frozen weights. It takes a GPU that multiplies FP8 (compute capability 8.9 or more)
and kernels that transformers fetches with the `kernels` package, and carries adapters on the attention alone: an update
of FP8 experts would be added to the FP8 values without their block scales, and get no gradient (transformers 5.23, peft
0.21; tests/test_models_silent_failures.py). Everything else computes with dequantized weights, which takes
twice the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from utils.exceptions import ArtefactError, Problem

LEAST_CAPABILITY = (8, 9)
# what transformers 5.23 takes (tests/test_planning_presets.py compares)
KERNELS = "kernels>=0.18.2,<0.19.0"
Setting = Literal["auto", "native", "dequantise"]


@dataclass(frozen=True)
class Facts:
    """`capability` is the GPU's, None on a CPU; `kernels` says why the FP8 kernels are not there, empty if they are."""

    capability: tuple[int, int] | None
    kernels: str
    on_experts: bool
    computes_in: Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Fp8Choice:
    """Whether the weights stay FP8, and why not, or on what they run."""

    native: bool
    why: str


def choose(setting: Setting, facts: Facts) -> Fp8Choice:
    """What becomes of an FP8 checkpoint. Raises ArtefactError when `native` was asked for and cannot be, saying why."""
    if setting == "dequantise":
        return Fp8Choice(False, "base.fp8 is dequantise")
    reasons = _reasons(facts)
    if reasons and setting == "native":
        fix = "--base.fp8 dequantise takes twice the memory and runs anywhere"
        fixes = {facts.kernels: f"pip install '{KERNELS}'; or {fix}"}
        problems = [Problem(f"--base.fp8 native cannot be: {why}", fix=fixes.get(why, fix)) for why in reasons]
        raise ArtefactError(problems)
    if reasons:
        return Fp8Choice(False, "; ".join(reasons))
    return Fp8Choice(
        True, "compute capability {}.{}, FP8 kernels, adapters on the attention alone".format(*facts.capability)
    )


def _reasons(facts: Facts) -> list[str]:
    """Why the weights cannot stay FP8."""
    reasons = []
    if facts.capability is None:
        reasons.append("there is no GPU")
    elif facts.capability < LEAST_CAPABILITY:
        reasons.append("the GPU has compute capability {}.{}, FP8 takes 8.9".format(*facts.capability))
    elif facts.kernels:
        reasons.append(facts.kernels)
    if facts.on_experts:
        reasons.append("an adapter on FP8 experts is silently wrong")
    if facts.computes_in == "float32":
        reasons.append("FP8 kernels compute in bfloat16, and base.dtype is float32")
    return reasons
