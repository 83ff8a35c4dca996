"""A dense base model quantized by bitsandbytes to 4 bits (nf4) or 8 bits (int8), and its dequantized weights.

The dequantized weights are written once as an ordinary model directory. That
directory is the base model from then on: its digest is what adapters belong to, exported adapters name it, composition
is checked on it in float32, and merging adds deltas to it. Training, evaluation and inference load it into 4 or 8 bits
again, which loses nothing: quantising what was de-quantised gives the same bits, and that is checked at every load.

Why not merge into the original weights? That would be another model than the one that was trained, composed and
evaluated; what it is worth nobody has asked.

No double quantisation (its second scale runs over a whole matrix; it would save 0.4 bits a weight), so the directory is
written a few rows at a time. int8 is LLM.int8(): on top of the weights, each activation is rounded to 8 bits too.
Source: Dettmers et al. 2022 (arXiv:2208.07339), 2023 (arXiv:2305.14314).

Shapes: R rows, I in_features.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils import disk
from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem, VerificationError
from utils.logger import event
from utils.models.model_shapes import NF4_BLOCK
from utils.models.structure import model_class
from utils.models.weights import safetensors_io, tensor_names
from utils.models.weights.safetensors_io import Checkpoint
from utils.progress import Progress

if TYPE_CHECKING:
    from utils.models.base_model import BaseModel

# rounding to 16 bits, once in the file and once in the module, as a share of a matrix's largest weight
LOAD_TOLERANCE = 2**-7


def make(base: BaseModel, kind: str, models_dir: Path, name: str) -> Path:
    """The directory with the dequantized weights of `base`, written first when it is not there.

    Raises ArtefactError for a model that cannot be quantised, and when the disk is too small.
    """
    target = models_dir / "base" / f"{name}-{kind}-{base.digest[:8]}"
    with files.locked(target.with_name(f".{target.name}"), "the quantised base model", waits=True):
        if not (target / files.MANIFEST).exists():
            facts = {"kind": "base", "source": base.source, "quantization": kind, "quantised_from": base.digest}
            with files.publish(target, lambda: facts | {"bitsandbytes": version("bitsandbytes")}) as directory:
                _write(_readable(Checkpoint(base.directory), kind), kind, directory)
            event("quantised base model ready", path=target)
    return target


def settings(kind: str, dtype: torch.dtype, directory: Path) -> Any:
    """What transformers needs to load the directory into its bits."""
    from transformers import BitsAndBytesConfig

    _, skipped = linear_modules(directory)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=False,
        llm_int8_skip_modules=skipped,
    )


def linear_modules(directory: Path) -> tuple[list[str], list[str]]:
    """(linear modules that are quantised, those that are not: output head, vision tower), by path in the model.

    Raises ArtefactError for a model with fused parameters, which would stay as they are.
    """
    model = model_class.outline(directory)
    inside = model_class.decoder(model)
    if fused := [name for name, parameter in inside.named_parameters() if parameter.ndim == 3]:
        what = f"{directory}: bitsandbytes does not quantise fused experts"
        raise ArtefactError(Problem(what, fused[0], "leave out --base.quantization"))
    within = {id(module) for module in inside.modules() if module is not model.get_output_embeddings()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return [n for n, m in linear.items() if id(m) in within], [n for n, m in linear.items() if id(m) not in within]


def rounded(weights_RI: torch.Tensor, kind: str) -> torch.Tensor:
    """What float32 weights mean after quantising, in float32; whole rows, and for nf4 whole blocks."""
    from bitsandbytes import functional

    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weights_RI.half())
        return functional.int8_vectorwise_dequant(codes, scales)
    codes, state = functional.quantize_4bit(weights_RI.contiguous(), quant_type=kind, blocksize=NF4_BLOCK)
    return functional.dequantize_4bit(codes, state)


def weights_of(module: torch.nn.Module) -> torch.Tensor:
    """The dequantized weights of a quantized module (O, I)."""
    from bitsandbytes import functional, nn

    if isinstance(module, nn.Linear4bit):
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    codes = module.weight.CB if module.weight.CB is not None else module.weight.data
    return functional.int8_vectorwise_dequant(codes, scales)


def is_quantised(module: torch.nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' linear ones."""
    return isinstance(module, torch.nn.Linear) and type(module).__module__.startswith("bitsandbytes.")


def keep_differentiable(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for a CPU's bfloat16 units at the first look without gradients.

    The packed product (0.50.2) has no backward pass, so after a measurement on dev every gradient through the base
    would be lost without a word; it also rounds float32 activations to bfloat16.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every product in 8 bits
    for module in model.modules():
        if is_quantised(module):
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def check_loaded(model: torch.nn.Module, directory: Path) -> None:
    """Raises VerificationError when the bits in memory mean other weights than the directory holds."""
    checkpoint = Checkpoint(directory)
    linear, _ = linear_modules(directory)
    modules = {name: module for name, module in model.named_modules() if is_quantised(module)}
    if unlike := sorted(set(linear) ^ set(modules)):
        raise VerificationError(
            Problem("bitsandbytes quantised other modules than those of the base model", unlike[:5])
        )
    for name, place in tensor_names.places(directory, checkpoint.homes).items():
        module = modules.get(place.parameter.removesuffix(".weight"))
        if module is None or not place.parameter.endswith(".weight"):
            continue
        weights_RI, first = weights_of(module).cpu(), 0
        for _, first, piece_RI in checkpoint.rows(checkpoint.homes[name], name):
            error = (weights_RI[first : first + len(piece_RI)].float() - piece_RI).abs().max()
            if not error <= LOAD_TOLERANCE * piece_RI.abs().max():
                what = f"{name} in memory is not what {directory} holds"
                raise VerificationError(Problem(what, float(error), "remove that directory: it is made again"))


def _readable(checkpoint: Checkpoint, kind: str) -> Checkpoint:
    """The checkpoint, when bitsandbytes reads these weights rightly. Raises ArtefactError."""
    fix, problems = "leave out --base.quantization", []
    if existing := checkpoint.config.get("quantization_config"):
        problems.append(Problem(f"{checkpoint.directory} is quantised already", existing, fix))
    widths = {name: checkpoint.tensor(name).shape[-1:] for name in checkpoint.homes}
    for name in linear_modules(checkpoint.directory)[0] if kind == "nf4" else ():
        if widths.get(f"{name}.weight", (0,))[0] % NF4_BLOCK:
            # bitsandbytes 0.50.2 takes a block that goes on in the next row for one that ends with its row (CPU)
            what = f"{name} has {widths[f'{name}.weight'][0]} inputs: bitsandbytes de-quantises such a matrix wrongly"
            problems.append(Problem(what, fix=f"{fix}, or use int8; nf4 takes multiples of {NF4_BLOCK}"))
    if problems:
        raise ArtefactError(problems[:5])
    return checkpoint


def _write(checkpoint: Checkpoint, kind: str, directory: Path) -> None:
    from utils.models.weights.companion_files import copy_companions

    parameters = {f"{name}.weight" for name in linear_modules(checkpoint.directory)[0]}
    places = tensor_names.places(checkpoint.directory, checkpoint.homes)
    changed = {name for name, place in places.items() if place.parameter in parameters}
    if len(changed) != len(parameters):
        lost = sorted(parameters - {place.parameter for place in places.values()})[:5]
        raise ArtefactError(Problem(f"{checkpoint.directory} has no tensor of its own for these modules", lost))
    total = sum(header.size for header in checkpoint.headers.values())
    disk.require(directory.parent, total, "what the quantised base means")
    with Progress(f"quantising to {kind}", total=total, unit="B") as bar, safetensors_io.one_thread():
        for path, header in checkpoint.headers.items():

            def content(
                name: str, path: Path = path, header: safetensors_io.Header = header
            ) -> Iterator[safetensors_io.Buffer]:
                if name not in changed:
                    return safetensors_io.raw(path, header, name)
                dtype = safetensors_io.DTYPES[header.tensors[name].dtype]
                pieces = checkpoint.rows(path, name)
                return (safetensors_io.as_bytes(rounded(piece_RI, kind).to(dtype)) for *_, piece_RI in pieces)

            planned = safetensors_io.plan(header.tensors, header.metadata)
            safetensors_io.write(directory / path.name, planned, content, bar.advance)
    for name in ("config.json", "model.safetensors.index.json"):
        if (source := checkpoint.directory / name).is_file():
            shutil.copyfile(source, directory / name)
    copy_companions(checkpoint.directory, directory)
