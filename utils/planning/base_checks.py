"""Whether a base model can be adapted: asked of its modules and of the names in its files, before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from config import Config
from utils.exceptions import ArtefactError, Problem
from utils.models import loading
from utils.models.base_model import BaseModel
from utils.models.structure import linear_modules, model_class
from utils.models.weights import tensor_names


def check(config: Config, base: BaseModel, stages: Sequence[str]) -> None:
    """Refuse (ArtefactError) a base model on which these stages' adapters could not be trained, composed and merged.

    Asked of its modules on the meta device and of the names in its files, so before anything is loaded.
    """
    model = model_class.outline(base.directory)
    problems = loading.attention_problems(type(model), config.base.attention)
    for stage in stages:
        lora = getattr(config, stage).lora
        found = linear_modules.problems(model, lora.target_modules, f"{stage}.lora.target_modules")
        fused = tensor_names.fused_parameters(model) if lora.experts else []
        if lora.experts and not fused:
            what = f"{stage}.lora.experts: the base model has no fused experts"
            found.append(Problem(what, fix=f"leave out --{stage}.lora.experts"))
        named = [*linear_modules.named(model, lora.target_modules), *fused]
        if not found and (lost := linear_modules.unplaced(base.directory, named)):
            what = f"{base.directory} keeps these weights in another form than the model, so no adapter can be merged"
            found.append(Problem(what, lost[:3], f"leave them out of --{stage}.lora.target_modules"))
        longest = model_class.position_table(model)
        tokens = getattr(config, stage).train.sequence_tokens
        if longest and tokens > longest:
            what = f"{stage}.train.sequence_tokens: the base model has {longest} positions"
            found.append(Problem(what, tokens, f"--{stage}.train.sequence_tokens {longest}"))
        problems += found
    if problems:
        raise ArtefactError(list({str(problem): problem for problem in problems}.values()))
