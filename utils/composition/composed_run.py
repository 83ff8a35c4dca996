"""The contents of a composed run: weights searched if asked for, adapter and card, what the checks and dev data say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Config
from utils.adapters import adapter_files, adapter_tokenizer, cards
from utils.adapters.factors import Factors, of_one_rank
from utils.artifacts import files
from utils.artifacts.runs import Run
from utils.composition import composed_adapter, dev_losses, interference, methods, pictures, search
from utils.composition.composed_adapter import Composition
from utils.composition.dev_losses import DevProbe
from utils.composition.methods import Recipe
from utils.logger import event, warning
from utils.models import float32_model
from utils.models.base_model import BaseModel
from utils.models.parallel import ranks
from utils.models.rows import row_support


def write(
    config: Config,
    base: BaseModel,
    adapters: Sequence[Run],
    parts: Sequence[Factors],
    data: Run | None,
    directory: Path,
) -> dict[str, Any]:
    """Write everything but the manifest into `directory`; returns the manifest's facts.

    `adapters` are the runs, domain and task first (or one of them alone), `parts` their factors, `data` the prepared
    data that they share, if any. Raises ArtefactError when the recipe does not fit, VerificationError when a
    check fails.
    """
    is_alone = len(adapters) == 1
    # a domain adapter alone was trained with none
    prompt = adapters[:2][-1].manifest.get("system_prompt", config.task.system_prompt)
    probe = None if is_alone else _probe(config, base, parts, data, prompt)
    recipe, is_searched = composed_adapter.recipe_of(config), config.compose.search
    if is_searched:
        recipe = _searched(config, probe, recipe, directory)
    composed = composed_adapter.checked_composition(parts, adapters, recipe, searched=is_searched)
    composed_adapter.say(config, composed)
    if not is_alone:
        _explain(probe, recipe, directory)
    rows = row_support.of(probe.model).to_json() if probe else None
    if probe is not None:
        probe.free()  # before the check loads a model in float32
    measured = composed_adapter.check_on_model(base, composed, config.base, directory / ".selfcheck")
    event("composition verified, differences of logits as shares of the largest one", **measured)
    _write_adapter(base, composed, directory)
    files.write_json(directory / "config.json", config.model_dump(mode="json"))
    facts = {"composition": composed_adapter.record(composed, base), "measured": measured, "system_prompt": prompt}
    facts |= adapter_tokenizer.remembered(config.inputs, base)
    return facts | ({"rows": rows} if rows else {})


def _probe(
    config: Config, base: BaseModel, parts: Sequence[Factors], data: Run | None, system_prompt: str
) -> ranks.Held | None:
    """The `DevProbe` that measures on dev, on every rank; None without data, or where it does not fit into memory."""
    if data is None or not float32_model.fits(base):
        return None
    dev = dev_losses.dev_data(config, base, data.directory, system_prompt)
    return ranks.Held(DevProbe.on, base, config.base, parts, dev)


def _searched(config: Config, probe: ranks.Held | None, recipe: Recipe, directory: Path) -> Recipe:
    """The recipe with the weights that are best on dev; writes down what was tried."""
    choice = dev_losses.search(probe, config.compose, directory / "search_points.jsonl")
    recipe = dev_losses.recipe_with(recipe, choice)
    files.write_json(directory / "search.json", search.to_json(choice))
    pictures.write_search(search.to_json(choice), directory / "search.html")
    event("weights chosen on dev", method=recipe.method, weights=recipe.weights, reason=choice.reason)
    return recipe


def _explain(probe: ranks.Held | None, recipe: Recipe, directory: Path) -> None:
    """Where the adapters collide: interference.json, its picture, and lines on stdout."""
    if probe is None:
        warning("no dev data, or too little memory for this model: interference is not explained")
        return
    explained = ranks.everywhere(interference.explain, probe, recipe)
    files.write_json(directory / "interference.json", explained)
    pictures.write_interference(explained, directory / "interference.html")
    for line in interference.lines(explained):
        print(line)


def _write_adapter(base: BaseModel, composed: Composition, directory: Path) -> None:
    """adapter/ with its card and, where experts are adapted, the same in adapter_per_expert/."""
    adapter_files.save(directory / "adapter", of_one_rank(composed.factors), base)
    card = cards.composed_card(
        base,
        list(composed.runs),
        method=composed.recipe.method,
        source=methods.METHODS[composed.recipe.method].source,
        weights=composed.recipe.weights or (1.0,) * len(composed.runs),
        exact=composed.check.exact,
        searched=composed.searched,
        check=composed.line(),
    )
    files.write_text(directory / "adapter" / "README.md", card)
    if any(f.is_experts for f in composed.factors.values()):
        if adapter_files.save_per_expert(directory / "adapter_per_expert", composed.factors, base):
            files.write_text(directory / "adapter_per_expert" / "README.md", card)
        else:
            event("no adapter_per_expert/: this checkpoint keeps its experts fused, so servers load adapter/")
