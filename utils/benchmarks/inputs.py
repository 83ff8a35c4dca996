"""What the suites share: a stream of tokens to work on, and two adapters of the shape that is served."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from config import AUTO, Config, LoraSection
from utils.adapters import parent_runs
from utils.adapters.factors import ModuleFactors
from utils.artifacts.runs import Run
from utils.composition import chosen_adapters, composed_adapter, methods
from utils.data.prepared import Prepared
from utils.exceptions import ArtefactError
from utils.logger import event, warning
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.models.structure import linear_modules


@dataclass(frozen=True)
class TokenStream:
    """Documents one after the other; positions start at 0 in each."""

    ids: torch.Tensor
    positions: torch.Tensor
    source: str


def token_stream(config: Config, base: BaseModel, count: int) -> TokenStream:
    """`count` tokens of the newest prepared corpus, repeated when it is shorter; random ids when there is none."""
    try:
        run = parent_runs.prepared_run(config, base)
        documents = Prepared(run.directory).documents("corpus").select_columns("input_ids")
    except ArtefactError:
        event("no prepared documents for this base model: random token ids")
        generator = torch.Generator().manual_seed(config.run.seed)
        vocabulary = len(chat.load_tokenizer(base.directory))
        return TokenStream(torch.randint(0, vocabulary, (count,), generator=generator), torch.arange(count), "random")
    pieces: list[torch.Tensor] = []
    total = number = 0
    while total < count:
        pieces.append(torch.tensor(documents[number % len(documents)]["input_ids"]))
        total += len(pieces[-1])
        number += 1
    positions = torch.cat([torch.arange(len(piece)) for piece in pieces])
    return TokenStream(torch.cat(pieces)[:count], positions[:count], str(run.directory))


def adapter_runs(config: Config, base: BaseModel) -> tuple[Run, Run] | None:
    """The domain and task run that would be served together, or None."""
    try:
        domain, task = chosen_adapters.pair(config, base)
    except ArtefactError:
        domain, task = None, None
    if domain is None or task is None:
        warning("no trained pair of adapters: random ones of the configured shape are as fast or slow")
        return None
    return domain, task


def adapter_pair(
    config: Config, base: BaseModel, model: torch.nn.Module, runs: tuple[Run, Run] | None
) -> tuple[dict[str, ModuleFactors], dict[str, ModuleFactors]]:
    """The factors of both runs with the weights that are used folded into the scale, or random ones."""
    if runs is None:
        return random_factors(model, config.domain.lora, seed=1), random_factors(model, config.task.lora, seed=2)
    composed = composed_adapter.composition(config, base)
    domain, task = methods.weighted(composed.parts, composed.recipe)
    return domain, task


def random_factors(model: torch.nn.Module, lora: LoraSection, seed: int) -> dict[str, ModuleFactors]:
    """Factors of the configured shape; their product is small beside the weights, as a trained one is."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    named = set(linear_modules.named(model, lora.target_modules)) if AUTO in lora.target_modules else None
    for name, module in model.named_modules():
        is_named = name.rpartition(".")[2] in lora.target_modules if named is None else name in named
        if isinstance(module, torch.nn.Linear) and is_named:
            a_rI = torch.randn(lora.rank, module.in_features, generator=generator) / module.in_features**0.5
            b_Or = torch.randn(module.out_features, lora.rank, generator=generator) * 0.01
            factors[name] = ModuleFactors(a_rI, b_Or, lora.alpha / lora.rank)
    return factors
