"""LoRA factors in, LoRA factors out: pure functions on tensors that know no disk, no PEFT and no model."""

from utils.composition.factors import Factors, ModuleFactors, delta, zero_modules
from utils.composition.weighted_sum import relative_error, weighted_sum

__all__ = ["Factors", "ModuleFactors", "delta", "relative_error", "weighted_sum", "zero_modules"]
