"""Compose adapters into one: exact by default, checked before it is saved, its weights searched on dev if asked for.

Reads the newest domain and task runs (the one that was trained, where there is only one), or any folders in PEFT's
format (--domain_adapter, --task_adapter, further ones with --compose.also); writes models/composed/<run>/ with adapter/
(one ordinary PEFT adapter), what the checks found, where the adapters collide, and, with --compose.search, the weights
chosen on the dev split. `inference`, `evaluate` and `--merge_path` then use it.

    python scripts/compose.py --compose.search
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config, run_label
from utils import cli

SECTIONS = ("compose", "inputs", "hub", "base", "run")
MOST_USED = ("compose.search", "compose.weights", "compose.method", "inputs.domain_adapter", "inputs.task_adapter")


def main(config: Config) -> dict[str, Any]:
    """Find the adapters, choose weights, compose, check, explain, save."""
    from utils import logger
    from utils.adapters import adapter_tokenizer, parent_runs, unmeant_base
    from utils.artifacts import runs
    from utils.composition import composed_adapter, composed_run
    from utils.composition.composed_identity import composed_identity
    from utils.evaluation.evaluation_for_card import evaluation_of
    from utils.export import hub
    from utils.models.parallel import sharding
    from utils.models.rows import row_probe
    from utils.planning import preflight

    hub.check(config.hub)
    composed_adapter.refuse_models_inside(config)  # before anything is fetched or built there
    base = preflight.start(config, loads_model=False, shards=config.compose.search, reads=unmeant_base.ADAPTERS)
    adapters = parent_runs.adapter_runs(config, base)
    if len(adapters) == 1:
        config = composed_adapter.for_one(config, adapters[0])
    base = adapter_tokenizer.with_chosen(base, adapters)
    data = parent_runs.data_of(config, base, adapters)
    parts = composed_adapter.load(adapters, base)
    identity = composed_identity(
        config.compose,
        base,
        adapters,
        data,
        config.run.seed,
        is_padded=composed_adapter.ranks_differ(parts),
        # what a search reads its losses by
        rows=row_probe.measured(base, config.base).deciding() if config.compose.search else {},
    )
    directory = runs.directory_for(config.run.models_dir, "composed", config.run.name, run_label(config), identity)
    composed_adapter.refuse_inside(directory, base, adapters)
    # what is refused leaves no half-made run behind
    composed_adapter.refuse_recipe(composed_adapter.recipe_of(config), parts)

    def fill() -> dict[str, Any]:
        facts = composed_run.write(config, base, adapters, parts, data, directory)
        parents = [*adapters, *([data] if data else [])]
        return runs.manifest(
            "composed",
            identity,
            base=base.record(),
            parents=parents,
            seed=config.run.seed,
            **facts,
            **sharding.loaded(),
        )

    run, is_there = runs.make(directory, identity, "the composition", fill)
    if is_there:
        logger.event("this composition is already complete", path=directory)
    runs.mark_latest(config.run.models_dir, "composed", directory)
    recorded = run.manifest["composition"]
    pushed = {}
    if config.hub.push_to_hub:
        evaluation = evaluation_of(config.run.models_dir, base.digest, adapters, recorded["recipe"])
        pushed["url"] = hub.push(run.adapter, config.hub, message="Composed adapter", evaluation=evaluation)
    return {
        "composed": str(directory),
        "adapter": str(run.adapter),
        "adapters": [str(r.directory) for r in adapters],
        "method": recorded["recipe"]["method"],
        "weights": recorded["recipe"]["weights"] or [1.0] * len(adapters),
        "searched": recorded["searched"],
        "exact": recorded["exact"],
        "relative_error": recorded["check"]["relative_error"],
        **run.manifest["measured"],
        **pushed,
    }


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.composition import methods
    from utils.planning import dry_run

    section, recipe = config.compose, methods.recipe_of(config.compose, config.run.seed)
    weights = "weights chosen on the dev split" if section.search else f"weights {recipe.weights or 'of 1'}"
    target = config.run.models_dir / "composed" / (config.run.name or f"{run_label(config)}-<fingerprint>")
    return [
        *dry_run.lines(config, "compose"),
        f"load the domain and the task adapter{' and ' + ', '.join(section.also) if section.also else ''}",
        f"compose them by {recipe.method} with {weights}",
        "check the factors, and the logits of base + all adapters against base + the composed one",
        f"write {target}/adapter",
    ]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__)
