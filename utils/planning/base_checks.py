"""Whether a base model can be adapted, and how ranks hold it: asked of its modules and of the names in its files.

Ranks share the experts of a sharded mixture where that is asked for, or where the plan says that it pays. A number that
cannot be is refused with every reason; `auto` then gathers, and the log says why.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from config import AUTO, Config
from utils.exceptions import ArtefactError, ConfigError, Problem
from utils.logger import event
from utils.models import devices, loading
from utils.models.base_model import BaseModel
from utils.models.model_shapes import GIB, Dtype, ModelSizes
from utils.models.parallel import expert_parallel, launcher, ranks
from utils.models.process_layout import ProcessLayout
from utils.models.rows import row_probe
from utils.models.rows.row_support import BY_PADDING, RowSupport
from utils.models.structure import linear_modules, model_class
from utils.models.weights import tensor_names
from utils.planning import estimates, hardware, pass_times, training_plan


def check(config: Config, base: BaseModel, stages: Sequence[str]) -> None:
    """Refuse (ArtefactError) a base model on which these stages' adapters could not be trained, composed and merged.

    Asked of its modules on the meta device and of the names in its files, so before anything is loaded.
    """
    model = model_class.outline(base.directory)
    problems = loading.attention_problems(type(model), config.base.attention)
    for stage in stages:
        lora = getattr(config, stage).lora
        stage_problems = linear_modules.problems(model, lora.target_modules, f"{stage}.lora.target_modules")
        fused = tensor_names.fused_parameters(model) if lora.experts else []
        if lora.experts and not fused:
            what = f"{stage}.lora.experts: the base model has no fused experts"
            stage_problems.append(Problem(what, fix=f"leave out --{stage}.lora.experts"))
        named = [*linear_modules.named(model, lora.target_modules), *fused]
        if not stage_problems and (lost := linear_modules.unplaced(base.directory, named)):
            what = f"{base.directory} keeps these weights in another form than the model, so no adapter can be merged"
            kept = set(linear_modules.leaves(named)) - set(linear_modules.leaves(lost))
            usable = [leaf for leaf in linear_modules.leaves(named) if leaf in kept]
            stage_problems.append(Problem(what, lost[:3], _other_targets(stage, usable)))
        longest = model_class.position_table(model)
        tokens = getattr(config, stage).train.max_sequence_tokens
        if longest and tokens > longest:
            what = f"{stage}.train.max_sequence_tokens: the base model has {longest} positions"
            stage_problems.append(Problem(what, tokens, f"--{stage}.train.max_sequence_tokens {longest}"))
        problems += stage_problems
    if problems:
        raise ArtefactError(list({str(problem): problem for problem in problems}.values()))


def quantization_refusals(sizes: ModelSizes, kind: Dtype, *, sharded: bool = False) -> list[Problem]:
    """Why a model of these shapes cannot be quantised, with the numbers; empty for one that can.

    `sharded`: the launcher would have FSDP shard the weights over its ranks.
    """
    fix = "leave out --base.quantization"
    if sharded:  # accelerate leaves bytes out of sharding, so each rank would hold all of them
        what = "FSDP does not shard weights in 4 or 8 bits"
        return [Problem(what, kind, f"{fix}, or launch with scripts/launch/one_gpu.yaml")]
    if sizes.experts:
        whole, kept = estimates.weight_bytes(sizes, "bfloat16") / GIB, estimates.weight_bytes(sizes, kind) / GIB
        what = (
            f"{sizes.model_type} keeps {sizes.parameters['experts'] / sizes.total:.0%} of its weights in fused "
            f"experts, which bitsandbytes does not quantise: {kind} would leave {kept:,.1f} of {whole:,.1f} GiB"
        )
        also = ", and it refuses an FP8 checkpoint" if sizes.stored == "fp8" else ""
        return [Problem(what + also, kind, fix)]
    if sizes.stored == "fp8":
        return [Problem("the checkpoint is FP8: bitsandbytes refuses it", kind, f"{fix}, or give a bfloat16 copy")]
    return []


def measured_rows(config: Config, base: BaseModel, stages: Sequence[str]) -> RowSupport:
    """What was measured on the base model. Raises ArtefactError where these stages' adapters could not be trained.

    Measured at the first call for a base model, on some of its layers: that takes seconds.
    """
    support, problems = row_probe.measured(base, config.base), []
    if not support.untrained:
        return support
    model = model_class.outline(base.directory)
    usable = [leaf for leaf in linear_modules.leaves(linear_modules.adaptable(model)) if leaf not in support.untrained]
    for stage in stages:
        setting = f"{stage}.lora.target_modules"
        leaves = linear_modules.leaves(linear_modules.named(model, getattr(config, stage).lora.target_modules))
        reasons = {leaf: support.untrained[leaf] for leaf in leaves if leaf in support.untrained}
        fix = _other_targets(stage, usable)
        for reason in dict.fromkeys(reasons.values()):
            if reason == BY_PADDING:
                fix = "set pad_token in its tokenizer_config.json to another token, such as its eos_token"
            what = f"{base.directory} cannot be trained on all of {setting}: {reason}"
            problems.append(Problem(what, [leaf for leaf in reasons if reasons[leaf] == reason], fix))
    if problems:
        raise ArtefactError(problems)
    return support


def _other_targets(stage: str, usable: Sequence[str]) -> str:
    return f"--{stage}.lora.target_modules {','.join(usable)}" if usable else "give another --base.source"


def share_experts(config: Config, base: BaseModel, sizes: ModelSizes | None, stage: str, *, native_fp8: bool) -> None:
    """Have every rank hold the experts as `shared_by` says. Errors as there."""
    count = shared_by(config, base, sizes, stage, native_fp8=native_fp8)
    if count != launcher.current().expert:
        ranks.everywhere(launcher.share_experts, count)


def shared_by(
    config: Config, base: BaseModel, sizes: ModelSizes | None, stage: str = "", *, native_fp8: bool = False
) -> int:
    """Ranks that hold each expert once: 1 where layers are gathered, or nothing is sharded.

    `sizes` are the base's, None where its architecture is not understood; `stage` is the adapter that is trained.
    Raises ConfigError for a number that was asked for and cannot be.
    """
    setting, layout = config.run.expert_parallel, launcher.current()
    if setting in ("off", "1"):
        return 1
    if setting == AUTO:
        count = min(layout.shard, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if count == 1 or sizes is None or not sizes.experts or devices.device().type != "cuda":
            return 1
        problems = _problems(base, ProcessLayout(layout.replicate, layout.shard, count), native_fp8)
        why = problems[0].what.removeprefix("run.expert_parallel: ") if problems else ""
        if not why and not pays(config, sizes, layout, count, stage):
            why = "the plan says that it is no faster"
        if why:
            event("layers of the model are gathered; ranks do not share its experts", why=why)
        return 1 if why else count
    if problems := _problems(base, ProcessLayout(layout.replicate, layout.shard, int(setting)), native_fp8):
        raise ConfigError(problems)
    return int(setting)


def pays(config: Config, sizes: ModelSizes, layout: ProcessLayout, expert_ranks: int, stage: str) -> bool:
    """Whether a pass over as many tokens is faster, at worst, where `expert_ranks` ranks share the experts."""
    shared, machine = ProcessLayout(layout.replicate, layout.shard, expert_ranks), hardware.of(config.plan)
    if stage:
        what = training_plan.step(config, stage, "bfloat16")
        times = [pass_times.training_pass(sizes, what, one, machine) for one in (layout, shared)]
    else:
        tokens, row = config.evaluate.batch_tokens, config.plan.item_tokens
        times = [pass_times.scoring_pass(sizes, "bfloat16", tokens, row, one, machine) for one in (layout, shared)]
    return times[1].most < times[0].most


def _problems(base: BaseModel, layout: ProcessLayout, native_fp8: bool) -> list[Problem]:
    problems = expert_parallel.problems(loading.skeleton(base), layout)
    if native_fp8:
        fix = "--base.fp8 dequantise, or --run.expert_parallel off"
        problems.append(Problem("run.expert_parallel: FP8 experts that stay FP8 are not shared", layout.expert, fix))
    return problems
