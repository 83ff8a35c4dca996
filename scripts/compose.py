"""Compose adapters into one: exact by default, checked before it is saved, its weights searched on dev if asked for.

Reads the newest domain and task runs, or any folders in PEFT's format (--domain_adapter, --task_adapter, further ones
with --compose.also); writes models/composed/<run>/ with adapter/ (one ordinary PEFT adapter), what the checks found,
where the adapters collide, and, with --compose.search, the weights chosen on the dev split. `inference`, `evaluate` and
`--merge_path` then use it.

    python scripts/compose.py --compose.search
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config
from utils import cli

SECTIONS = ("compose", "inputs", "hub", "base", "run")
MOST_USED = ("compose.search", "compose.weights", "compose.method", "inputs.domain_adapter", "inputs.task_adapter")


def main(config: Config) -> dict[str, Any]:
    """Find the adapters, choose weights, compose, check, explain, save."""
    from utils import logger
    from utils.adapters import find
    from utils.artifacts import runs
    from utils.composition import composed_adapter
    from utils.evaluation.find_evaluation import evaluation_of
    from utils.export import hub
    from utils.planning import preflight

    hub.check(config.hub)
    composed_adapter.refuse_models_inside(config)  # before anything is fetched or built there
    base = preflight.start(config, loads_model=False)
    found = find.adapter_runs(config, base)
    data = find.data_of(config, base, found)
    identity = _identity(config, base, found, data)
    directory = runs.directory_for(config.run.models_dir, "composed", config.run.name, config.preset, identity)
    composed_adapter.refuse_inside(directory, base, found)
    parts = composed_adapter.load(found, base)
    composed_adapter.refuse_recipe(
        composed_adapter.recipe_of(config), parts
    )  # what is refused leaves no half-made run behind

    def fill() -> dict[str, Any]:
        facts = _make(config, base, found, parts, data, directory)
        parents = [*found, *([data] if data else [])]
        return runs.manifest("composed", identity, base=base.record(), parents=parents, seed=config.run.seed, **facts)

    run, is_there = runs.make(directory, identity, "the composition", fill)
    if is_there:
        logger.event("this composition is already complete", path=directory)
    runs.mark_latest(config.run.models_dir, "composed", directory)
    recorded = run.manifest["composition"]
    pushed = {}
    if config.hub.push_to_hub:
        evaluation = evaluation_of(config.run.models_dir, base.digest, found, recorded["recipe"])
        pushed["url"] = hub.push(run.adapter, config.hub, message="Composed adapter", evaluation=evaluation)
    return {
        "composed": str(directory),
        "adapter": str(run.adapter),
        "adapters": [str(r.directory) for r in found],
        "method": recorded["recipe"]["method"],
        "weights": recorded["recipe"]["weights"] or [1.0] * len(found),
        "searched": recorded["searched"],
        "exact": recorded["exact"],
        "relative_error": recorded["check"]["relative_error"],
        **run.manifest["measured"],
        **pushed,
    }


def _identity(config: Config, base: Any, found: list[Any], data: Any) -> dict[str, Any]:
    from utils.composition import composed_adapter

    recipe = composed_adapter.recipe_of(config)
    resolved = {
        "method": recipe.method,
        "weights": list(recipe.weights),
        "rank": recipe.rank,
        "density": recipe.density,
    }
    return {
        "stage": "composed",
        "base": base.digest,
        "adapters": [run.digest for run in found],
        "data": data.digest if data else None,
        "compose": config.compose.model_dump(mode="json", exclude={"also"}) | resolved,
        "seed": config.run.seed,
    }


def _make(config: Config, base: Any, found: list[Any], parts: Any, data: Any, directory: Path) -> dict[str, Any]:
    """Everything in the composed run but its manifest; returns the manifest's facts."""
    from utils.adapters import adapter_files, cards
    from utils.artifacts import files
    from utils.composition import composed_adapter, dev_losses, interference, methods, pictures, search
    from utils.logger import event, warning
    from utils.models import float32_model

    prompt = found[1].manifest["system_prompt"]
    recipe, choice, probe = composed_adapter.recipe_of(config), None, None
    dev = dev_losses.dev_data(config, base, data.directory, prompt) if data else None
    if dev is not None and float32_model.fits(base):
        probe = dev_losses.DevProbe.on(base, config.base, parts, dev)
    if config.compose.search:
        choice = dev_losses.search(probe, config.compose, directory / "search_points.jsonl")
        recipe = dev_losses.recipe_with(recipe, choice)
        files.write_json(directory / "search.json", search.to_json(choice))
        pictures.search_picture(choice, directory / "search.png")
        event("weights chosen on dev", method=recipe.method, weights=recipe.weights, reason=choice.reason)
    made = composed_adapter.made(parts, found, recipe, searched=choice is not None)
    composed_adapter.say(made)
    if probe is not None:
        explained = interference.explain(probe, recipe)
        files.write_json(directory / "interference.json", explained)
        pictures.interference_picture(explained, directory / "interference.png")
        for line in interference.lines(explained):
            print(line)
        probe = None  # its model goes before the check loads one in float32
    else:
        warning("no dev data, or too little memory for this model: interference is not explained")
    measured = composed_adapter.check_on_model(base, made, config.base, directory / ".selfcheck")
    event("composition verified", **measured)
    adapter_files.save(directory / "adapter", made.factors, base)
    card = cards.composed_card(
        base,
        found,
        method=recipe.method,
        source=methods.METHODS[recipe.method].source,
        weights=recipe.weights or (1.0,) * len(found),
        exact=made.check.exact,
        searched=made.searched,
        check=made.line(),
    )
    files.write_text(directory / "adapter" / "README.md", card)
    if any(f.is_experts for f in made.factors.values()):
        adapter_files.save_per_expert(directory / "adapter_per_expert", made.factors, base)
        files.write_text(directory / "adapter_per_expert" / "README.md", card)
    files.write_json(directory / "config.json", config.model_dump(mode="json"))
    return {"composition": composed_adapter.record(made), "measured": measured, "system_prompt": prompt}


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.composition import methods
    from utils.planning import dry_run

    section, recipe = config.compose, methods.recipe_of(config.compose, config.run.seed)
    weights = "weights chosen on the dev split" if section.search else f"weights {recipe.weights or 'of 1'}"
    target = config.run.models_dir / "composed" / (config.run.name or f"{config.preset}-<fingerprint>")
    return [
        *dry_run.lines(config, "compose"),
        f"load the domain and the task adapter{' and ' + ', '.join(section.also) if section.also else ''}",
        f"compose them by {recipe.method} with {weights}",
        "check the factors, and the logits of base + all adapters against base + the composed one",
        f"write {target}/adapter",
    ]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__)
