"""What decides a composed adapter, under names that stay when settings are renamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from config import ComposeSection
from utils.artifacts.identity import Identity, chosen
from utils.artifacts.runs import Run
from utils.composition.methods import METHODS, OPEN, recipe_of
from utils.models.base_model import BaseModel

# raised when a search with the same settings may choose otherwise; compositions without one are not made anew.
# 1: every setting on all of dev; 2: a quadratic model on a part of dev, confirmed on all of it (2026-11-30)
SEARCH_METHOD = 2
# recorded name -> setting, for a search
SEARCH = {
    "methods": "search_methods",
    "domain_retention": "domain_retention",
    "max_dev_items": "max_dev_items",
    "max_dev_documents": "max_dev_documents",
}


def composed_identity(
    section: ComposeSection,
    base: BaseModel,
    adapters: Sequence[Run],
    data: Run | None,
    seed: int,
    *,
    is_padded: bool = False,
    rows: Mapping[str, Any] | None = None,
) -> Identity:
    """The identity of these adapters composed as the section says; `data` is what a search would choose on.

    `is_padded`: the ranks of the modules differ, and until 2026-11-30 were not made one. `rows`: in what a search's
    losses are other than those of a plain decoder (`RowSupport.deciding`).
    """
    resolved = recipe_of(section, seed)
    recorded = {
        "base": base.digest,
        "adapters": [run.digest for run in adapters],
        "data": data.digest if data else None,
        "compose": section.model_dump(mode="json") | {name: getattr(resolved, name) for name in OPEN},
        "seed": seed,
    }
    own = ({"one_rank": True} if is_padded else {}) | dict(rows or {}) | base.deciding_tokenizer()
    own |= {"search_method": SEARCH_METHOD} if section.search else {}
    return Identity.of("composed", _values(recorded) | own, _values)


def _values(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The deciding values of an identity that holds the whole section, as those of before 2026-11-30 do."""
    section, adapters = recorded["compose"], recorded["adapters"]
    method = METHODS[section["method"]]
    recipe: dict[str, Any] = {"method": section["method"], "weights": list(section["weights"])}
    if not recipe["weights"] and not section["search"]:
        recipe["weights"] = [1.0] * (len(adapters) * method.numbers(1))
    recipe |= {name: section[name] for name in method.reads}
    # without a search dev data only explain
    search = {"search": chosen(section, SEARCH), "data": recorded["data"]} if section["search"] else {}
    return {"base": recorded["base"], "adapters": adapters, "recipe": recipe, **search, "seed": recorded["seed"]}
