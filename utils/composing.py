"""Adapters that were found become one: loaded strictly, composed by the recipe, checked before anything uses it.

`inference`, `evaluate`, `benchmark` and the merge all come through `composition`. It takes the newest composed run of
the same adapters when the command says nothing about weights, so what a search chose is what is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from config import BaseModelSection, Config
from utils import adapter_files, adapters, base_model, files, frozen_lora, lineage, runs
from utils.base_model import BaseModel
from utils.composition import METHODS, FactorCheck, Factors, Recipe, check, compose, depth, weights_at
from utils.exceptions import ArtefactError, Problem, VerificationError
from utils.logger import event
from utils.runs import Run

# float32 logits of equal models differ by rounding only, relative to the largest logit
SAME_LOGITS = 1e-4
# an adapter that moves logits less than this does nothing that could be told from rounding
AN_EFFECT = 1e-3
RECIPE_FIELDS = ("compose.method", "compose.weights", "compose.rank", "compose.density")


@dataclass(frozen=True)
class Composition:
    """One adapter made of several, what it was made of, and what was checked."""

    factors: Factors
    parts: tuple[Factors, ...]
    runs: tuple[Run, ...]
    recipe: Recipe
    check: FactorCheck
    searched: bool
    run: Run | None = None

    def line(self) -> str:
        """The check in one line."""
        c = self.check
        if c.exact:
            laws = f"identity {c.identity_error:.1e}, absence {c.absence_error:.1e}, order {c.order_error:.1e}"
            return f"exact: relative error {c.relative_error:.1e}, {laws}"
        return (
            f"approximate: {c.mean_relative_error:.1%} from the exact sum, {c.relative_error:.1%} at {c.worst_module}"
        )


def composition(config: Config, base: BaseModel, which: str = "both") -> Composition:
    """The adapters of this command, composed and checked. Raises ArtefactError or VerificationError."""
    found = lineage.adapter_runs(config, base, which)
    parts = load(found, base)
    if which != "both":
        return made(parts, found, Recipe(weights=(1.0,)), searched=False)
    said = [field for field in RECIPE_FIELDS if field in config.overrides]
    if not said and (run := _composed_run(config, base, found)):
        files.verify(run.directory)
        recorded = run.manifest["composition"]
        recipe = Recipe(**{**recorded["recipe"], "weights": tuple(recorded["recipe"]["weights"])})
        event("using the newest composed run of these adapters", path=run.directory, weights=recipe.weights)
        factors = adapter_files.load(run.adapter, base)
        return Composition(
            factors, parts, tuple(found), recipe, _checked(factors, parts, recipe), recorded["searched"], run
        )
    return made(parts, found, recipe_of(config), searched=False)


def load(found: Sequence[Run], base: BaseModel) -> tuple[Factors, ...]:
    """The factors of each adapter, checked against the base model's own tensors."""
    return tuple(adapter_files.load(run.adapter, base) for run in found)


def made(parts: Sequence[Factors], found: Sequence[Run], recipe: Recipe, *, searched: bool) -> Composition:
    """Compose and check. Raises ArtefactError when the recipe does not fit, VerificationError when a check fails."""
    try:
        factors = compose(parts, recipe)
    except ValueError as error:
        raise ArtefactError(Problem(f"these adapters do not compose: {error}", fix="see --weights")) from error
    return Composition(factors, tuple(parts), tuple(found), recipe, _checked(factors, parts, recipe), searched)


def recipe_of(config: Config) -> Recipe:
    """What the settings ask for."""
    section = config.compose
    return Recipe(section.method, section.weights, section.rank, section.density, config.run.seed)


def record(found: Composition) -> dict[str, Any]:
    """What a manifest says about a composition."""
    return {
        "recipe": asdict(found.recipe),
        "exact": METHODS[found.recipe.method].exact,
        "source": METHODS[found.recipe.method].source,
        "searched": found.searched,
        "check": asdict(found.check),
    }


def say(found: Composition) -> None:
    """One line about what is used, and one when its weights are untested."""
    names = ", ".join(run.directory.as_posix() for run in found.runs)
    weights = found.recipe.weights or (1.0,) * len(found.runs)
    event("composed", adapters=names, method=found.recipe.method, weights=weights, check=found.line())
    if len(found.runs) > 1 and not found.searched:
        event("these weights are untested: `python scripts/compose.py --compose.search` chooses them on the dev split")


def check_on_model(base: BaseModel, found: Composition, section: BaseModelSection) -> dict[str, float]:
    """`check_logits` on the base model, loaded in float32."""
    model = base_model.load_model(base, section, dtype=torch.float32)
    return check_logits(found, model, probe(base).to(model.device))


@torch.no_grad()
def check_logits(found: Composition, model: Any, probe_BT: torch.Tensor) -> dict[str, float]:
    """Points 3 and 4 of the self-check in float32: all parts active at their weights = the one composed adapter, which
    is neither the base nor the last part alone. The parts go through our layers, the composed adapter through PEFT's.
    `model` is the bare base in float32; the composed adapter stays on it.

    Returns differences relative to the largest logit. Raises VerificationError.
    """
    names = [f"part{i}" for i in range(len(found.parts))]
    parts = frozen_lora.attach(frozen_lora.sharing_weights(model), dict(zip(names, found.parts, strict=True)))
    at = select_by(found.recipe, found.parts, names)
    frozen_lora.select(parts, at)
    several = parts(probe_BT).logits.float()
    frozen_lora.select(parts, lambda module: {names[-1]: at(module)[names[-1]]})
    alone, base = parts(probe_BT).logits.float(), model(probe_BT).logits.float()
    composed = adapters.add(model, "composed", found.factors)(probe_BT).logits.float()
    size = float(composed.abs().max())
    differences = {
        "parts_active_to_composed": float((several - composed).abs().max()) / size,
        "composed_to_base": float((composed - base).abs().max()) / size,
        "composed_to_last_part": float((composed - alone).abs().max()) / size,
    }
    problems = []
    if found.check.exact and not differences["parts_active_to_composed"] <= SAME_LOGITS:
        problems.append(
            Problem("all adapters active and the composed one differ", differences["parts_active_to_composed"])
        )
    if not differences["composed_to_base"] > AN_EFFECT:
        problems.append(Problem("the composed adapter does not change the model", differences["composed_to_base"]))
    if not differences["composed_to_last_part"] > AN_EFFECT and _others_matter(found):
        problems.append(Problem("only the last adapter has an effect", differences["composed_to_last_part"]))
    if problems:
        raise VerificationError(problems)
    return differences


def select_by(recipe: Recipe, parts: Sequence[Factors], names: Sequence[str]) -> Callable[[str], dict[str, float]]:
    """Module -> weight of each named part, for `frozen_lora.select`."""
    layers = depth(parts)
    return lambda module: dict(zip(names, weights_at(module, recipe, len(parts), layers), strict=True))


def refuse_inside(target: Path, base: BaseModel, found: Sequence[Run]) -> None:
    """Raises ArtefactError when an output would be written into one of its inputs."""
    for source in (base.directory, *(run.directory for run in found)):
        if target.resolve().is_relative_to(source.resolve()):
            raise ArtefactError(
                Problem(f"the output lies inside its input {source}", str(target), "choose another path")
            )


def probe(base: BaseModel, rows: int = 2, tokens: int = 48) -> torch.Tensor:
    """Token ids (rows, tokens) on which models are compared: a sentence, then random ids; the same every time."""
    tokenizer = base_model.load_tokenizer(base.directory)
    text = tokenizer("The quick brown fox explains what a function does:", add_special_tokens=False)["input_ids"]
    ids = torch.randint(0, len(tokenizer), (rows, tokens), generator=torch.Generator().manual_seed(0))
    ids[0, : min(len(text), tokens)] = torch.tensor(text[:tokens])
    return ids


def _checked(factors: Factors, parts: Sequence[Factors], recipe: Recipe) -> FactorCheck:
    done = check(factors, parts, recipe)
    if done.problems:
        raise VerificationError([Problem(f"the composed adapter is not what it should be: {p}") for p in done.problems])
    return done


def _others_matter(found: Composition) -> bool:
    """Whether any adapter but the last has a weight other than 0."""
    layers, count = depth(found.parts), len(found.parts)
    modules = [(i, m) for i, part in enumerate(found.parts[:-1]) for m in part]
    return any(weights_at(m, found.recipe, count, layers)[i] != 0.0 for i, m in modules)


def _composed_run(config: Config, base: BaseModel, found: Sequence[Run]) -> Run | None:
    wanted = [run.digest for run in found]
    for run in runs.complete_runs(config.run.models_dir, "composed"):
        identity = run.manifest["identity"]
        if identity["base"] == base.digest and identity["adapters"] == wanted:
            return run
    return None
