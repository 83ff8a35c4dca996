"""What vLLM's MiniMax-M2 loader asks of a directory, read from vllm_minimax_m2.json and held against one. No tests.

Each function returns what is wrong, in words; an empty list is what a loadable directory gives.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

RULES: dict[str, Any] = json.loads((Path(__file__).parent / "vllm_minimax_m2.json").read_text(encoding="utf-8"))
ATTENTION, EXPERTS = ("q", "k", "v", "o"), ("w1", "w2", "w3")


def problems_of_model(directory: Path) -> list[str]:
    """A merged model in bfloat16 or float32, or in FP8 when its config.json says so."""
    settings = json.loads((directory / "config.json").read_text())
    found = [f"{name} is missing" for name in RULES["files"] if not (directory / name).is_file()]
    found += [*_config(settings)]
    wanted, there = _tensors(settings), _headers(directory)
    found += [f"{name} is missing" for name in sorted(wanted.keys() - there.keys())]
    found += [f"{name} is no tensor of this model" for name in sorted(there.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & there.keys()):
        if wanted[name] != there[name]:
            found.append(f"{name} is {there[name]}, wanted is {wanted[name]}")
    index = directory / "model.safetensors.index.json"
    if index.is_file() and json.loads(index.read_text())["weight_map"].keys() != there.keys():
        found.append("the index does not name the tensors that are there")
    return found


def problems_of_adapter(directory: Path, settings: dict[str, Any], *, experts: bool) -> list[str]:
    """An adapter for the model with these settings: on the attention, or with a pair for each matrix of each expert."""
    rules, said = RULES["adapter"], json.loads((directory / "adapter_config.json").read_text())
    found = [f"adapter_config.json lacks {key}" for key in rules["required"] if key not in said]
    found += [f"{key} is {said.get(key)!r}" for key, value in rules["values"].items() if said.get(key) != value]
    found += [f"{key} is {said[key]!r}" for key in rules["off"] if said.get(key)]
    state, names = load_file(directory / "adapter_model.safetensors"), set()
    for place, leaf, layer, expert in _places(settings, experts=experts):
        pair = [rules[place].format(layer=layer, expert=expert, leaf=leaf, side=side) for side in "AB"]
        if not any(name in state for name in pair) and place == "attention":
            continue  # vLLM takes an adapter on some of the matrices
        names |= {*pair}
        rows, columns = (_dimensions(settings)[name] for name in rules["leaves"][leaf])
        shapes = [tuple(state[name].shape) if name in state else None for name in pair]
        if None in shapes:
            found.append(f"{pair[shapes.index(None)]} is missing")
        elif shapes[0][1] != columns or shapes[1][0] != rows or shapes[0][0] != shapes[1][1]:
            found.append(f"{pair[0]} and B are {shapes}, the matrix is {(rows, columns)}")
    return found + [f"{name} is no name that vLLM maps" for name in sorted(state.keys() - names)]


def updates(directory: Path, *, experts: bool, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What vLLM adds to each matrix, by its name in the checkpoint: one scale for all, whatever the patterns say."""
    said, state = (
        json.loads((directory / "adapter_config.json").read_text()),
        load_file(directory / "adapter_model.safetensors"),
    )
    scale = said["lora_alpha"] / (math.sqrt(said["r"]) if said.get("use_rslora") else said["r"])
    found = {}
    for place, leaf, layer, expert in _places(settings, experts=experts):
        a, b = (RULES["adapter"][place].format(layer=layer, expert=expert, leaf=leaf, side=side) for side in "AB")
        if a in state:
            name = a.removeprefix("base_model.model.").replace(".lora_A", "")
            found[name] = scale * state[b].float() @ state[a].float()
    return found


def _config(settings: dict[str, Any]) -> Iterator[str]:
    rules = RULES["config"]
    yield from (f"{key} is {settings.get(key)!r}" for key, v in rules["values"].items() if settings.get(key) != v)
    yield from (f"config.json lacks {key}" for key in rules["required"] if settings.get(key) is None)
    yield from (f"config.json has none of {keys}" for keys in rules["one_of"] if not settings.keys() & {*keys})
    yield from (f"{key} names code that is not there" for key in rules["names_code"] if key in settings)
    if quantisation := settings.get("quantization_config"):
        values = RULES["quantisation"]["values"]
        yield from (f"quantisation: {key} is not {v}" for key, v in values.items() if quantisation.get(key) != v)


def _tensors(settings: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor that this config.json asks for."""
    is_fp8, rules = "quantization_config" in settings, RULES["quantisation"]
    plain = {"float32": "F32", "bfloat16": "BF16"}[settings.get("dtype") or settings["torch_dtype"]]
    sizes, found = _dimensions(settings), {}
    layers, experts = range(settings["num_hidden_layers"]), range(settings["num_local_experts"])
    for pattern, rule in RULES["tensors"].items():
        shape = tuple(sizes[name] for name in rule["shape"])
        quantised = is_fp8 and rule.get("quantised", False)
        for layer, expert in itertools.product(
            layers if "{layer}" in pattern else [0], experts if "{expert}" in pattern else [0]
        ):
            name = pattern.format(layer=layer, expert=expert)
            found[name] = (rules["dtype"] if quantised else rule.get("dtype", plain), shape)
            if quantised:
                grid = tuple(math.ceil(n / b) for n, b in zip(shape, rules["values"]["weight_block_size"], strict=True))
                found[name + rules["scale"]["suffix"]] = (rules["scale"]["dtype"], grid)
    return found


def _headers(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                piece = reader.get_slice(name)
                found[name] = (piece.get_dtype(), tuple(piece.get_shape()))
    return found


def _places(settings: dict[str, Any], *, experts: bool) -> Iterator[tuple[str, str, int, int]]:
    """(kind, leaf, layer, expert) of every matrix that may have an update."""
    for layer in range(settings["num_hidden_layers"]):
        yield from (("attention", leaf, layer, 0) for leaf in ATTENTION)
        if experts:
            for expert in range(settings["num_local_experts"]):
                yield from (("experts", leaf, layer, expert) for leaf in EXPERTS)


def _dimensions(settings: dict[str, Any]) -> dict[str, int]:
    return {
        "vocabulary": settings["vocab_size"],
        "hidden": settings["hidden_size"],
        "inner": settings["intermediate_size"],
        "experts": settings["num_local_experts"],
        "query": settings["num_attention_heads"] * settings["head_dim"],
        "key": settings["num_key_value_heads"] * settings["head_dim"],
    }
