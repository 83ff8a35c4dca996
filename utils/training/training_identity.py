"""What decides a trained adapter, under names that stay when settings are renamed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from config import RENAMED, USUAL_ROW_TOKENS, Config, LoraSection, TaskSection, TrainSection, with_today_s_names
from utils.artifacts.identity import MARK, Identity, chosen, same_names
from utils.artifacts.runs import Run
from utils.data.retrieval.retrieved_prompts import TRAINED_PASSAGES, TRAINED_TOKENS
from utils.models import devices
from utils.models.base_model import BaseModel
from utils.models.model_shapes import PLAIN
from utils.models.structure import linear_modules, model_class
from utils.models.weights import tensor_names
from utils.planning import preflight

# recorded name -> setting
LORA = same_names("rank", "alpha", "dropout", "use_rslora")
TRAIN = RENAMED | same_names(
    *("learning_rate", "epochs", "max_steps", "batch_tokens", "weight_decay", "max_grad_norm", "keep")
)
# what the adapter that is kept is chosen by; the last one is not chosen
CHOICE = same_names("evals_per_epoch", "max_dev_tokens")
# in today's settings, whose `max_steps` overrides `epochs`
OVERRIDES = "max_steps_override_epochs"
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def identity_of(config: Config, stage: str, base: BaseModel, data: Run, **facts: Any) -> Identity:
    """Everything that decides a trained adapter; `facts` are the stage's own."""
    section = getattr(config, stage)
    return training_identity(
        stage,
        base,
        data,
        section.lora,
        section.train,
        seed=config.run.seed,
        dtype=config.base.dtype,
        native_fp8=preflight.form(config, stage, base).native,
        facts=facts,
    )


def training_identity(
    stage: str,
    base: BaseModel,
    data: Run,
    lora: LoraSection,
    train: TrainSection,
    *,
    seed: int,
    dtype: str,
    native_fp8: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Identity:
    """The identity of a domain or task adapter; `dtype` as in `base.dtype`, `facts` the stage's own (`task_facts`)."""

    def values(recorded: Mapping[str, Any]) -> dict[str, Any]:
        """The deciding values of an identity that holds whole sections, as those of before 2026-11-30 do."""
        kept = {
            key: value
            for key, value in recorded.items()
            # attention is recorded beside it: it trades memory for time
            if key not in ("lora", "train", "attention")
        }
        train = recorded["train"]
        deciding_values = {**kept, "lora": _decided_lora(recorded["lora"], base), "train": _decided_train(train)}
        if stage == "task" and train["micro_batch_tokens"] != train["batch_tokens"]:
            deciding_values[MARK] = 0  # until 2026-11-30 which pairs made a step depended on the micro-batch
        if train["max_steps"] and OVERRIDES not in train:
            deciding_values[MARK] = 0  # until 2026-11-30 a run ended with its epochs, whatever max_steps said
        return deciding_values

    whole = {
        "base": base.digest,
        "data": data.digest,
        "lora": lora.model_dump(mode="json"),
        "train": train.model_dump(mode="json") | {"micro_batch_tokens": train.batch_tokens, OVERRIDES: True},
        "seed": seed,
        "dtype": str(devices.compute_dtype(dtype)),
        **({"fp8": "native"} if native_fp8 else {}),
        **({} if base.quantization == PLAIN else {"quantization": base.quantization}),
        **(facts or {}),
    }
    return Identity.of(stage, values(whole), values)


def task_facts(task: TaskSection, domain: Run | None) -> dict[str, Any]:
    """What decides a task adapter beside what both stages have."""
    facts = {
        "on": task.on,
        "domain_adapter": domain.digest if domain else None,
        "system_prompt": task.system_prompt,
    }
    if task.prompt_loss_weight:  # left out at 0, which is what adapters of before have
        facts["prompt_loss_weight"] = task.prompt_loss_weight
    if task.turns != "all":
        facts["turns"] = task.turns
    if task.retrieval:
        facts["retrieval"] = {"passages": TRAINED_PASSAGES, "tokens": TRAINED_TOKENS}
    return facts


def keep_facts(task: TaskSection, retention: float, documents: Run | None) -> dict[str, Any]:
    """What decides how a task adapter keeps its domain; nothing where it does not, as adapters of before have it.

    `documents` is the prepared data whose documents are at hand, `retention` what `auto` asks for.
    """
    if task.keep_domain == "off":
        return {}
    keeping: dict[str, Any] = {"how": task.keep_domain, "share": task.replay_share}
    if task.keep_domain == "auto":
        keeping["retention"] = retention
    elif task.keep_from_step:
        keeping["from_step"] = task.keep_from_step
    if task.keep_domain != "kl":
        keeping["documents"] = documents.digest if documents else None
    return {"keep_domain": keeping}


def keep_settings(run: Run) -> dict[str, Any]:
    """Settings of `TaskSection` that say how a task run was told to keep its domain."""
    keeping = run.manifest["identity"].get("keep_domain")
    if not keeping:
        return {"keep_domain": "off"}
    return {
        "keep_domain": keeping["how"],
        "replay_share": keeping["share"],
        "keep_from_step": keeping.get("from_step", 0),
    }


def decided(run: Run) -> dict[str, Any]:
    """The same with what it decided for itself, as its controls have to be told."""
    keeping = run.manifest.get("measured", {}).get("keeping")
    if not keeping or keeping["how"] == "off":
        return {"keep_domain": "off"}
    return {"keep_domain": keeping["how"], "replay_share": keeping["share"], "keep_from_step": keeping["from_step"]}


def start_facts(initial: Run | None, finished: Run | None = None) -> dict[str, Any]:
    """What decides an adapter that started from another, or went on from a finished run; nothing for a fresh one."""
    facts = {"init_from": initial.digest} if initial else {}
    return facts | ({"continue_from": finished.digest} if finished else {})


def adapted_modules(base: BaseModel, targets: list[str], *, experts: bool) -> dict[str, str]:
    """Path of every module that the target names find, its layers as `*` -> the layers, e.g. "0-29" or "0,2,4".

    Found in the model without its weights; a name that finds nothing is refused before anything is trained.
    """
    model = model_class.outline(base.directory)
    fused = tensor_names.fused_parameters(model) if experts else []
    layers: dict[str, list[int]] = {}
    for name in [*linear_modules.named(model, targets), *fused]:
        number = _LAYER.search(f"{name}.")
        layers.setdefault(_LAYER.sub("*", name, count=1), []).append(int(number[0]) if number else 0)
    return {path: _ranges(sorted(numbers)) for path, numbers in sorted(layers.items())}


def _decided_lora(lora: Mapping[str, Any], base: BaseModel) -> dict[str, Any]:
    modules = adapted_modules(base, list(lora["target_modules"]), experts=bool(lora.get("experts")))
    return chosen(lora, LORA) | {"modules": modules}


def _decided_train(train: Mapping[str, Any]) -> dict[str, Any]:
    train = with_today_s_names(train)
    deciding_values = chosen(train, TRAIN)
    if train["max_steps"]:
        deciding_values.pop("epochs")  # as in the field, so many steps are made in as many passes as they take
    # of settings that still leave it open: what follows the data has its length by the time a run is opened
    deciding_values["sequence_tokens"] = deciding_values["sequence_tokens"] or USUAL_ROW_TOKENS
    if train["keep"] == "best":
        deciding_values |= chosen(train, CHOICE)
    return deciding_values


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1][1:] = [number]
        else:
            pieces.append([number])
    return ",".join("-".join(map(str, piece)) for piece in pieces)
