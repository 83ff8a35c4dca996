"""Fused experts: one update in its three spellings, and where a checkpoint's own tensors sit in the model.

transformers 5 keeps the experts of a layer as one 3-D parameter (E, O, I); checkpoints, vLLM and older adapters have
one 2-D matrix per expert. Here factors are A (E, r, I), B (E, O, r). On disk PEFT lays them out as lora_A (E*r, I),
expert-major, and lora_B (O, r*E), rank-major (peft 0.21 `ParamWrapper`): joining two such files along a dimension is
wrong (measured relative error 1.05), joining factors expert by expert is exact.

Shapes: E experts, r rank, I in_features, O out_features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.exceptions import ArtefactError, Problem

if TYPE_CHECKING:
    import torch

# registration order in the modelling code: PEFT nests its wrappers in this order, the last one outermost
FUSED = ("gate_up_proj", "down_proj")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where one on-disk tensor sits: all of `parameter`, or rows of one expert of it (part i of n equal ones).

    `transposed`: inputs come before outputs, (I, O) or (E, I, O). `known`: the model has such a parameter.
    """

    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    transposed: bool = False
    known: bool = True


def fused_parameters(model: torch.nn.Module) -> list[str]:
    """Paths of the fused expert parameters, also of a model that already carries adapters."""
    named = ((name.replace(".base_layer", ""), parameter) for name, parameter in model.named_parameters())
    return [name for name, p in named if p.ndim == 3 and name.rpartition(".")[2] in FUSED]


def places(directory: Path, names: Iterable[str]) -> dict[str, Place]:
    """On-disk tensor name -> its place in the model of `directory`, by the rules with which transformers loads it.

    Tensors whose conversion is anything but stacking experts and joining row blocks keep their renamed name, so a
    delta for such a parameter finds no tensor and the merge says so.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, rename_source_key

    from utils.models.structure import model_class

    model = model_class.outline(directory)
    parameters = dict(model.state_dict())
    transposed = transposed_parameters(model)
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    sources = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    places = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if renamed not in parameters and name in parameters:
            renamed, pattern = rename_source_key(name, [], [], prefix, parameters)
        place = Place(renamed, transposed=renamed in transposed, known=renamed in parameters)
        if pattern is not None and (expert := _EXPERT.search(name)):
            operations = sources[pattern].operations
            kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
            if kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
                siblings = list(sources[pattern].source_patterns)
                place = replace(place, expert=int(expert[1]), part=siblings.index(pattern), parts=len(siblings))
            else:
                place = Place(name, known=False)
        elif pattern is not None and sources[pattern].operations:
            place = Place(name, known=False)
        places[name] = place
    return places


def transposed_parameters(model: torch.nn.Module) -> set[str]:
    """Parameters in which inputs come before outputs: GPT-2's Conv1D, and fused experts of some architectures."""
    from transformers.pytorch_utils import Conv1D

    names = set()
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            names.add(f"{name}.weight")
        elif getattr(module, "is_transposed", False):
            names |= {f"{name}.{leaf}" for leaf, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return {name.replace(".base_layer", "") for name in names}


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a model directory, from the headers of its safetensors files."""
    from safetensors import SafetensorError, safe_open

    from utils.models.weights.safetensors_io import weight_files

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as reader:
                shapes |= {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ArtefactError(Problem(f"{path} is damaged ({error})", fix="restore it from a copy")) from error
    return shapes


def weight_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name under which factors refer to it -> (O, I) or (E, O, I), for every matrix that an adapter could update.

    A linear module goes by its path, a fused parameter by its own name; scales of block-quantised weights are left out.
    """
    on_disk = {n: s for n, s in tensor_shapes(directory).items() if not n.endswith("weight_scale_inv")}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, place in places(directory, on_disk).items():
        shape = on_disk[name]
        if place.expert is not None:
            experts = max(place.expert + 1, shapes.get(place.parameter, (0,))[0])
            shapes[place.parameter] = (experts, place.parts * shape[0], shape[1])
        elif len(shape) in (2, 3) and place.known:
            logical = (*shape[:-2], shape[-1], shape[-2]) if place.transposed else shape
            shapes[place.parameter.removesuffix(".weight")] = logical
    return shapes


_TOWER = re.compile(r"vis|audio|image|speech")
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")


def layer_of(module: str) -> int | None:
    """The layer of an adapted module: the first number of its path, whatever the list is called that it lies in.

    None outside the layers (embeddings, output head). Composed adapters are checked by the model's own module lists.
    """
    match = _NUMBER.search(f".{module}.")
    return int(match[1]) if match else None


def decoder_list(names: Iterable[str], count: int) -> str:
    """The list of a model's decoder layers, e.g. `model.layers` or `transformer.h`, read off the names of its tensors.

    It is an outermost list with the numbers 0..count-1: rather one without further ones (some checkpoints append layers
    for drafts), rather none of a vision or audio tower, and the one with the most tensors. Raises ArtefactError when
    there is none.
    """
    numbers: dict[str, set[int]] = {}
    tensors: dict[str, int] = {}
    for name in names:
        for match in _NUMBER.finditer(f".{name}."):
            path = name[: max(0, match.start() - 2)]
            numbers.setdefault(path, set()).add(int(match[1]))
            tensors[path] = tensors.get(path, 0) + 1
    fitting = [path for path, indices in numbers.items() if indices >= set(range(count))]
    outermost = [p for p in fitting if not any(p.startswith(f"{other}.") for other in fitting)]
    if not outermost:
        lists = {path: len(indices) for path, indices in sorted(numbers.items())[:8]}
        raise ArtefactError(Problem(f"none of the model's numbered lists has its {count} layers", lists))
    return max(outermost, key=lambda path: (len(numbers[path]) == count, not _TOWER.search(path), tensors[path]))


def number_in(path: str | None, name: str) -> int | None:
    """The number under which a tensor or module lies in the list at `path`; None when it does not."""
    if path is None:
        return None
    first = name.removeprefix(f"{path}.").partition(".")[0] if name.startswith(f"{path}.") else ""
    return int(first) if first.isdigit() else None
