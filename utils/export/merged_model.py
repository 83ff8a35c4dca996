"""A merged model with everything around its weights: identity, card, manifest; the same one is not made twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import BaseModelSection, MergeSection
from utils.adapters import cards
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.composition import composed_adapter
from utils.composition.composed_adapter import Composition
from utils.evaluation.evaluation_for_card import Evaluation, evaluation_of
from utils.exceptions import ArtefactError, Problem
from utils.export import merge, model_index
from utils.logger import event
from utils.models.base_model import BaseModel
from utils.models.parallel import sharding


@dataclass(frozen=True)
class MergedModel:
    """A complete merged model; `checks` is what was measured when it was made."""

    directory: Path
    checks: dict[str, Any]
    evaluation: Evaluation | None
    is_reused: bool


def make(
    base: BaseModel,
    composed: Composition,
    settings: MergeSection,
    section: BaseModelSection,
    *,
    models_dir: Path,
    seed: int,
) -> MergedModel:
    """Base + composed adapter at `settings.path`, written and checked unless exactly it is there already.

    The card has the numbers of the composition's newest evaluation in `models_dir`. Raises as `merge.merge` does.
    """
    target = Path(settings.path)
    composed_adapter.refuse_inside(target, base, composed.runs)
    composition = composed_adapter.record(composed, base)
    evaluation = evaluation_of(models_dir, base.digest, composed.runs, composition["recipe"])
    identity = _identity(base, composed, composition, settings)
    if (target / files.MANIFEST).exists():
        if changed := identity.differences(files.read_manifest(target).get("identity")):
            what = f"{target} holds another merged model: {'; '.join(changed[:8])}"
            raise ArtefactError(Problem(what, fix="choose another --merge_path; nothing is ever overwritten"))
        checks = files.verify(target)["measured"]
        event("this merged model is already complete", path=target)
        return MergedModel(target, checks, evaluation, is_reused=True)

    def manifest(checks: dict[str, Any]) -> dict[str, Any]:
        parents = [*composed.runs, *([composed.run] if composed.run and composed.run not in composed.runs else [])]
        facts = {"composition": composition, "seed": seed}
        return runs.manifest(
            "merged", identity, base=base.record(), parents=parents, measured=checks, **facts, **sharding.loaded()
        )

    card = cards.merged_card(
        base,
        composed.runs,
        method=composed.recipe.method,
        source=composition["source"],
        weights=composed.recipe.weights or (1.0,) * len(composed.runs),
        exact=composed.check.exact,
        searched=composed.searched,
        dtype=settings.dtype,
        check=composed.line(),
    )
    if evaluation:
        card = model_index.with_evaluation(card, target.name, evaluation)
    checks = merge.merge(
        base,
        composed.factors,
        target,
        settings,
        section,
        fingerprint=identity.fingerprint,
        manifest=manifest,
        card=card,
    )
    event("merged model written", path=target)
    return MergedModel(target, checks, evaluation, is_reused=False)


def copy(base: BaseModel, settings: MergeSection, section: BaseModelSection, *, seed: int) -> MergedModel:
    """The base model alone at `settings.path` in `settings.dtype`: an FP8 one in bfloat16, say; checked as a merge."""
    target = Path(settings.path)
    composed_adapter.refuse_inside(target, base, ())
    identity = Identity.of("merged", {"base": base.digest, "adapters": [], "recipe": None, "dtype": settings.dtype})
    if (target / files.MANIFEST).exists() and identity.is_of(files.read_manifest(target).get("identity")):
        event("this copy is already complete", path=target)
        return MergedModel(target, files.verify(target)["measured"], None, is_reused=True)

    def manifest(checks: dict[str, Any]) -> dict[str, Any]:
        return runs.manifest("merged", identity, base=base.record(), parents=[], measured=checks, seed=seed)

    facts = {"fingerprint": identity.fingerprint, "manifest": manifest}
    checks = merge.merge(
        base, {}, target, settings, section, card=cards.copied_card(base, dtype=settings.dtype), **facts
    )
    event("copy of the base model written", path=target)
    return MergedModel(target, checks, None, is_reused=False)


def _identity(base: BaseModel, composed: Composition, composition: dict[str, Any], settings: MergeSection) -> Identity:
    """Everything that decides the merged weights."""
    adapters, recipe = [run.digest for run in composed.runs], composition["recipe"]
    decides = {"base": base.digest, "adapters": adapters, "recipe": recipe, "dtype": settings.dtype}
    decides |= base.deciding_tokenizer()
    return Identity.of("merged", decides)
