"""Before any weight is read: what the model is, whether it fits the memory there is, and what training will take."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import BaseModelSection, Config, reason_of
from utils.adapters import own_modules, peft_model, unmeant_base
from utils.artifacts import files
from utils.exceptions import ArtefactError, ConfigError, PipelineError, Problem, is_out_of_memory
from utils.logger import event, warning
from utils.models import devices, directory_checks, sources
from utils.models.architectures import registry, size_class
from utils.models.base_model import BaseModel
from utils.models.model_shapes import GIB, PLAIN, Dtype, ModelSizes
from utils.models.parallel import launcher, ranks
from utils.models.weights import fp8
from utils.planning import (
    base_checks,
    estimates,
    expert_imbalance,
    fitting_settings,
    plan_report,
    training_plan,
)
from utils.planning.memory import count_parameters, native_fp8
from utils.planning.memory.native_fp8 import Fp8Choice

if TYPE_CHECKING:
    from peft import PeftModel

# smaller models are loaded without a word about their size
WORTH_SAYING_BYTES = 16 * GIB
# how long the hub may take to say that it is there
HUB_SECONDS = 5


@dataclass(frozen=True)
class Machine:
    """Where this process runs: `shards` ranks hold the weights together, `local` run here; `expert` as there."""

    shards: int
    local: int
    gpu_bytes: int
    host_bytes: int
    expert: int = 1

    @classmethod
    def here(cls) -> Machine:
        """This process's launcher and memory."""
        on_gpu = devices.device().type == "cuda"
        return cls(
            shards=launcher.current().shard,
            local=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            gpu_bytes=torch.cuda.get_device_properties(devices.device()).total_memory if on_gpu else 0,
            host_bytes=devices.host_bytes(),
            expert=launcher.current().expert,
        )


def check(config: Config, *, loads_model: bool = True, stage: str = "") -> None:
    """Say what is about to be loaded, and refuse (ArtefactError) what this machine cannot hold; nothing is fetched yet.

    `stage` is the adapter that will be trained. Models whose shapes are not known before they are here (wheels, other
    hub ids offline) pass.
    """
    sizes = _quick(config.base, config.run.models_dir)
    if sizes is None:
        return
    if stage and f"{stage}.train.learning_rate" not in config.overrides:
        size_class.refuse_small_settings(config.preset, sizes, stage)
    dtype, why = loaded_dtype(config.base), ""
    if config.base.quantization != PLAIN:
        sharded = loads_model and Machine.here().shards > 1
        if cannot := base_checks.quantization_refusals(sizes, dtype, sharded=sharded):
            raise ArtefactError(cannot)
    if sizes.stored == "fp8":
        choice = keep_fp8(config, stage) if stage else Fp8Choice(False, "only training can keep it FP8")
        dtype, why = ("fp8" if choice.native else dtype), choice.why
    if estimates.weight_bytes(sizes, dtype) >= WORTH_SAYING_BYTES:
        event(plan_report.headline(sizes, dtype))
    if loads_model and (problems := refusals(sizes, dtype, Machine.here(), why)):
        raise ArtefactError(problems)


def keep_fp8(config: Config, stage: str) -> Fp8Choice:
    """Whether an FP8 checkpoint stays FP8 while this adapter is trained here, and why. Raises ArtefactError when it
    has to (`base.fp8` native) and cannot."""
    on_experts = getattr(config, stage).lora.experts
    if stage == "task" and config.task.on != "base":
        on_experts = on_experts or config.domain.lora.experts
    on_gpu = devices.device().type == "cuda"
    capability = torch.cuda.get_device_capability(devices.device()) if on_gpu else None
    can = capability is not None and capability >= native_fp8.LEAST_CAPABILITY and config.base.fp8 != "dequantise"
    narrow = devices.compute_dtype(config.base.dtype) == torch.bfloat16
    return native_fp8.choose(
        config.base.fp8,
        native_fp8.Facts(
            capability=capability,
            kernels=_missing_kernels() if can else "",
            on_experts=on_experts,
            computes_in="bfloat16" if narrow else "float32",
        ),
    )


def form(config: Config, stage: str, base: BaseModel) -> Fp8Choice:
    """As `fp8`, for a base model that is here; one that is not stored in FP8 is loaded as it is, for no reason."""
    if fp8.is_fp8(files.read_object(base.directory / "config.json")):
        return keep_fp8(config, stage)
    if config.base.fp8 == "native":
        what = f"--base.fp8 native: {base.source} is no FP8 checkpoint"
        raise ArtefactError(Problem(what, fix="leave out --base.fp8"))
    return Fp8Choice(False, "")


def refusals(sizes: ModelSizes, dtype: Dtype, machine: Machine, why: str = "") -> list[Problem]:
    """Why these weights cannot be loaded on this machine, with the numbers and the fix.

    `why` is the reason for which an FP8 checkpoint is de-quantised.
    """
    whole = estimates.weight_bytes(sizes, dtype)
    part, host = whole, estimates.loading_bytes(sizes, dtype, processes=machine.local, sharded=machine.shards > 1)
    if machine.shards > 1:
        part = whole // machine.shards + whole * estimates.gathered_parameters(sizes) // sizes.total
        if not machine.gpu_bytes:
            host = max(host, machine.local * part)  # on CPUs the parts are in main memory
    places = [("main memory", host, machine.host_bytes)]
    if machine.gpu_bytes:
        places.append(("GPU memory per rank", part, machine.gpu_bytes))
    fix = (
        f"plan it: python scripts/plan.py {_preset(sizes)}--plan.gpus 8 --plan.gpu_memory_gib 80 names the launch file "
        "for your GPUs; here take a smaller model: --preset smollm2_135m, or --base.source DIRECTORY"
    )
    if dtype == "float32" and estimates.weight_bytes(sizes, "bfloat16") <= min(there for _, _, there in places):
        fix = "--base.dtype bfloat16 halves it"
    stored = ""
    if sizes.stored == "fp8" and dtype != "fp8":
        size = plan_report.gib(estimates.weight_bytes(sizes, "fp8"))
        stored = f"; it is stored in FP8 ({size}) and de-quantised{f', because {why}' if why else ''}"
    processes = f" for {machine.local} ranks, each with its copy" if machine.local > 1 >= machine.shards else ""
    return [
        Problem(
            f"{sizes.model_type} has {sizes.total:,} parameters: in {dtype} its weights take {needed / GIB:,.1f} GiB "
            f"of {place}{processes}, {there / GIB:,.1f} GiB are there{stored}",
            fix=fix,
        )
        for place, needed, there in places
        if needed > there
    ]


def predicted(config: Config, stage: str, base: BaseModel) -> estimates.TrainingMemory | None:
    """What one training step of this stage takes here by arithmetic; None for an architecture that is not understood.

    On a GPU that is what `torch.cuda.max_memory_allocated` will say; a CPU's figure has the libraries in it too.
    """
    sizes = _understood(files.read_object(base.directory / "config.json"))
    if sizes is None:
        return None
    machine = Machine.here()
    dtype: Dtype = "fp8" if form(config, stage, base).native else loaded_dtype(config.base)
    step = training_plan.step(config, stage, dtype)
    imbalance = config.plan.expert_imbalance or expert_imbalance.expected(sizes.experts, machine.expert)
    memory = estimates.training_memory(
        *(sizes, step), shards=machine.shards, expert_ranks=machine.expert, imbalance=imbalance
    )
    there = machine.gpu_bytes or machine.host_bytes
    if memory.total > there:
        local = {"gpus": machine.local, "nodes": 1, "gpu_memory_gib": there / GIB, "headroom_gib": 0}
        here = fitting_settings.with_settings(config, {f"plan.{name}": value for name, value in local.items()})
        warning(
            f"the {stage} adapter's training step is predicted not to fit",
            predicted_gib=memory.total / GIB,
            there_gib=there / GIB,
            instead="; ".join(plan_report.changes(here, sizes)[:3]),
        )
    return memory


def check_trainable(model: PeftModel, config: Config, stage: str, base: BaseModel) -> None:
    """Raises ArtefactError when another number of parameters is trainable than the settings ask for.

    PEFT widens some targets on mixtures of experts, and doubles ranks, without a word.
    """
    sizes = _understood(files.read_object(base.directory / "config.json"))
    if sizes is None:
        return
    expected = sum(estimates.lora_parameters(sizes, training_plan.adapter(getattr(config, stage).lora)).values())
    count = sum(p.numel() for p in peft_model.trainable_parameters(model).values())
    if count != expected:
        what = f"{count:,} parameters are trainable, the {stage} adapter's settings ask for {expected:,}"
        raise ArtefactError(Problem(what, fix=f"name leaf modules in --{stage}.lora.target_modules"))


def exact(section: BaseModelSection, models_dir: Path) -> ModelSizes:
    """The shapes counted on the meta device, from config.json alone: of a directory, the hub, or what is built here.

    Some are built in, for when the hub cannot be reached. Raises ArtefactError for what cannot be counted.
    """
    try:
        settings = _settings(section, models_dir, ask_hub=True)
        if settings is None:
            settings = files.read_object(sources.fetch(section, models_dir).directory / "config.json")
        return count_parameters.of_settings(settings)
    except PipelineError:
        raise
    except Exception as error:  # as in `_understood`
        what = f"the architecture of {section.source} cannot be counted: {(str(error).splitlines() or [''])[0]}"
        raise ArtefactError(Problem(what, fix="give a causal language model that transformers knows")) from error


def loaded_dtype(section: BaseModelSection) -> Dtype:
    """What the frozen weights become in memory, where an FP8 checkpoint is de-quantised."""
    if section.quantization != PLAIN:
        return section.quantization
    return "float32" if devices.compute_dtype(section.dtype) == torch.float32 else "bfloat16"


@functools.cache
def _missing_kernels() -> str:
    """Why transformers' FP8 kernels are not there, asked of transformers itself; empty when they are."""
    from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

    try:
        load_finegrained_fp8_kernel()
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # the hub's and the driver's errors too
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


def _quick(section: BaseModelSection, models_dir: Path) -> ModelSizes | None:
    settings = _settings(section, models_dir, ask_hub=registry.published(section.source) is None)
    if settings and (problems := directory_checks.quantised(settings, section.source)):
        raise ArtefactError(problems)
    return _understood(settings) if settings else None


def _understood(settings: dict[str, Any]) -> ModelSizes | None:
    try:
        return (registry.of(settings.get("model_type")).sizes or count_parameters.of_settings)(settings)
    except Exception as error:  # models raise whatever their next line does, of kinds of their own too
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _say_uncounted(str(settings.get("model_type")), reason)
        return None


@functools.cache
def _say_uncounted(model_type: str, reason: str) -> None:
    event(
        "this model cannot be counted, so its memory and time are not predicted", model_type=model_type, reason=reason
    )


def _settings(section: BaseModelSection, models_dir: Path, *, ask_hub: bool) -> dict[str, Any] | None:
    """config.json of a base model, without its weights; None when it can only be known after fetching or building."""
    kind, _, rest = section.source.partition(":")
    directory = models_dir / "base" / section.name if kind in ("wheel", "toy") and rest else Path(section.source)
    if (directory / "config.json").is_file():
        return files.read_object(directory / "config.json")
    if directory.is_dir() or (kind in ("wheel", "toy") and rest):
        return None
    published = registry.published(section.source)
    if published and not ask_hub:
        return dict(published.settings)
    from huggingface_hub import constants, get_session, hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        if published and not constants.HF_HUB_OFFLINE:
            # one look first: a download tries again for half a minute before it says that there is no network
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        return files.read_object(
            Path(hf_hub_download(section.source, "config.json", revision=section.revision or None))
        )
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if published is None:
            return None
        reason = str(error).splitlines()[0]
        warning(f"the hub cannot be reached: counting {published.title} as it was published", reason=reason)
        return dict(published.settings)


def _preset(sizes: ModelSizes) -> str:
    published = registry.of(sizes.model_type).published
    return f"--preset {published.preset} " if published else ""


def start(
    config: Config,
    *,
    loads_model: bool = True,
    stage: str = "",
    shards: bool | None = None,
    reads: tuple[str, ...] = (),
) -> BaseModel:
    """Threads, seed and the base model on every rank; one of each node fetches or builds it while the others wait.

    A model that this machine cannot hold is refused before it is fetched, unless the script only streams its files.
    `stage` is the adapter that the script trains, if it does; `shards` says of a script that streams files first
    whether it loads the model after all; `reads` are the stages of runs without which there is nothing to do.
    """
    devices.refuse_missing_gpus()
    devices.warn_of_processes()
    if not config.base.source:
        fix = "base.source: a directory, or a hub id with base.revision"
        raise ConfigError(Problem(f"preset {config.preset} names no base model", fix=fix))
    if stage and config.preset.startswith("size_"):
        event(f"preset {config.preset}: {reason_of(config.preset)}")
    check(config, loads_model=loads_model, stage=stage)
    unmeant_base.refuse_missing_inputs(config)
    unmeant_base.refuse(config, unmeant_base.PREPARED if stage else reads)
    base = ranks.everywhere(_ready, config)
    if loads_model if shards is None else shards:
        sizes = _understood(files.read_object(base.directory / "config.json"))
        base_checks.share_experts(
            config, base, sizes, stage, native_fp8=bool(stage) and form(config, stage, base).native
        )
    base_checks.check(config, base, (stage,) if stage else ())
    return base


def _fetched(config: Config) -> BaseModel:
    """The base model, with the modules that an adapter of this command trained whole."""
    base = sources.fetch(config.base, config.run.models_dir)
    given = (config.inputs.domain_adapter, config.inputs.task_adapter, *config.compose.also)
    return own_modules.base_with(base, own_modules.folders_of(given), config.run.models_dir)


def _ready(config: Config) -> BaseModel:
    devices.set_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    base = ranks.first_of_node(lambda: _fetched(config))
    fix = "give every node the same files: a file system that all of them see, or copies of one digest"
    ranks.refuse_unequal({"digest": base.digest}, "the base model", ArtefactError, fix)
    return base
