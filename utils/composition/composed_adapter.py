"""Adapters that were found become one: loaded strictly, composed by the recipe, checked before anything uses it.

`inference`, `evaluate`, `benchmark` and the merge all come through `composition`. It takes the composed run that is in
use when no setting says how to compose, so what a search chose is what is used.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from config import BaseModelSection, Config
from utils import flags
from utils.adapters import adapter_files, cards, inference_layers, peft_model
from utils.adapters.factors import Factors
from utils.artifacts import files, runs
from utils.artifacts.runs import Run
from utils.composition import methods
from utils.composition.checks import FactorCheck, check
from utils.composition.chosen_adapters import in_use
from utils.composition.methods import METHODS, SUM, Recipe, compose, depth, weights_at
from utils.exceptions import ArtefactError, Problem, VerificationError
from utils.logger import event
from utils.models import float32_model
from utils.models.base_model import BaseModel
from utils.models.weights import layer_sample
from utils.models.weights.safetensors_io import Checkpoint

# float32 logits of equal models differ by rounding only, relative to the largest logit
SAME_LOGITS = 1e-4


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
    asks_for_itself = methods.asks_for_itself(config.compose)
    chosen = in_use(config, base, which, needs_parts=asks_for_itself)
    adapters = chosen.adapters
    parts = load(adapters, base)
    if chosen.is_alone:
        return checked_composition(parts, adapters, Recipe(weights=(1.0,)), searched=False, run=chosen.composed)
    if chosen.composed is None or asks_for_itself:
        recipe = recipe_of(config if len(adapters) > 1 else for_one(config, adapters[0]))
        if len(adapters) == 1 and recipe.method != SUM:
            recipe = Recipe(weights=(1.0,))
        return checked_composition(parts, adapters, recipe, searched=False)
    run = chosen.composed
    files.verify(run.directory)
    recorded = run.manifest["composition"]
    recipe = Recipe(**{**recorded["recipe"], "weights": tuple(recorded["recipe"]["weights"])})
    event("as it was composed", method=recipe.method, weights=recipe.weights or (1.0,) * len(adapters))
    factors, searched = adapter_files.load(run.adapter, base), recorded["searched"]
    return Composition(factors, parts, adapters, recipe, _checked(factors, parts, recipe), searched, run)


def load(adapters: Sequence[Run], base: BaseModel) -> tuple[Factors, ...]:
    """The factors of each adapter, checked against the base model's own tensors."""
    return tuple(adapter_files.load(run.adapter, base) for run in adapters)


def checked_composition(
    parts: Sequence[Factors], adapters: Sequence[Run], recipe: Recipe, *, searched: bool, run: Run | None = None
) -> Composition:
    """Compose and check. Raises ArtefactError when the recipe does not fit, VerificationError when a check fails."""
    try:
        factors = compose(parts, recipe)
    except ValueError as error:
        raise ArtefactError(
            Problem(f"these adapters do not compose: {error}", fix=flags.help_command("compose.weights"))
        ) from error
    return Composition(factors, tuple(parts), tuple(adapters), recipe, _checked(factors, parts, recipe), searched, run)


def recipe_of(config: Config) -> Recipe:
    """What the settings ask for. Raises ConfigError, for those that no command line has checked."""
    return methods.recipe_of(config.compose, config.run.seed)


def for_one(config: Config, only: Run) -> Config:
    """The settings as they apply to one adapter: of the weights its own, and nothing to search."""
    section = config.compose
    if section.search:
        event("one adapter has nothing to be weighed against: no weights are searched", adapter=only.directory)
    weights = section.weights or (1.0,)
    if len(weights) == 2:
        weights = (weights[only.manifest["kind"] == "task"],)
    own_section = section.model_copy(update={"weights": weights, "search": False})
    return config.model_copy(update={"compose": own_section})


def record(composed: Composition, base: BaseModel) -> dict[str, Any]:
    """What a manifest says about a composition."""
    return {
        "recipe": asdict(composed.recipe),
        "exact": METHODS[composed.recipe.method].exact,
        "source": METHODS[composed.recipe.method].source,
        "searched": composed.searched,
        "check": asdict(composed.check),
        **({"asserted": asserted} if (asserted := cards.asserted(base, composed.runs)) else {}),
    }


def say(config: Config, composed: Composition) -> None:
    """One line about what is used, and one when its weights were not chosen on dev."""
    names = ", ".join(run.directory.as_posix() for run in composed.runs)
    weights = composed.recipe.weights or (1.0,) * len(composed.runs)
    event("composed", adapters=names, method=composed.recipe.method, weights=weights, check=composed.line())
    if len(composed.runs) > 1 and not composed.searched:
        if searched := _searched_run(config, composed):
            take = f"--composed {shlex.quote(searched.directory.as_posix())}"
            weights = searched.manifest["composition"]["recipe"]["weights"]
            event(f"a search chose other weights for these adapters; to take those: {take}", weights=weights)
        else:
            event(f"the weights were not chosen on dev: {searching(config, composed)} does that")


def _searched_run(config: Config, composed: Composition) -> Run | None:
    """The newest composed run of these adapters whose weights a search chose."""
    adapters = [run.digest for run in composed.runs]
    for run in runs.complete_runs(config.run.models_dir, "composed"):
        searched = run.manifest.get("composition", {}).get("searched")
        if searched and run.manifest["identity"].get("adapters") == adapters:
            return run
    return None


def searching(config: Config, composed: Composition) -> str:
    """The command that searches the weights of these adapters."""
    # adapters that were named are not those that the command would take by itself
    named = {"inputs.domain_adapter", "inputs.task_adapter", "inputs.composed"} & set(config.overrides)
    which = [
        f" --{r.manifest['kind']}_adapter {shlex.quote(r.directory.as_posix())}" for r in composed.runs[:2] if named
    ]
    return f"{runs.STAGES['composed']} --compose.search{''.join(which)}{flags.given(config, 'base')}"


def check_on_model(base: BaseModel, composed: Composition, section: BaseModelSection, scratch: Path) -> dict[str, Any]:
    """Points 3 and 4 of the self-check, on the base model in float32; on some of its layers where it is too large.

    Raises VerificationError. `scratch` is a directory that does not exist, for the small model.
    """
    checkpoint = Checkpoint(base.directory)
    layers = layer_sample.choose(checkpoint, composed.factors, float32_model.available())
    parts, factors = composed.parts, composed.factors
    try:
        if len(layers) < layer_sample.layer_count(checkpoint):
            event("the model is larger than memory: some of its layers are checked", checked_layers=layers)
            layer_sample.write(checkpoint, layers, scratch)
            base = replace(base, directory=scratch)
            parts = [layer_sample.factors_of(part, layers) for part in parts]
            factors = layer_sample.factors_of(factors, layers)
        model = float32_model.in_float32(base, section)
        # the weights by the place that the model itself gives a layer: composing goes by names
        places = {name: layers[place] for name, place in layers_of(model, factors).items()}
        _refuse_unplaced(composed.recipe, parts, places)
        parts = methods.weighted(parts, composed.recipe, depth(composed.parts), places)
        checked = check_logits(parts, factors, model, float32_model.probe(checkpoint), exact=composed.check.exact)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"checked_layers": layers, **checked}


@torch.no_grad()
def check_logits(
    parts: Sequence[Factors], composed: Factors, model: Any, ids_BT: torch.Tensor, *, exact: bool
) -> dict[str, float]:
    """All weighted parts active = the one composed adapter, which is neither the base nor the last part alone.

    The parts go through our layers, the composed adapter through PEFT's, which stays on `model`, the bare base in
    float32. Returns differences relative to the largest logit. Raises VerificationError.
    """
    names = [f"part{i}" for i in range(len(parts))]
    ids_BT = ids_BT.to(model.device)
    several = inference_layers.attach(inference_layers.sharing_weights(model), dict(zip(names, parts, strict=True)))
    active = several(ids_BT).logits.float()
    inference_layers.select(several, {names[-1]: 1.0})
    alone, plain = several(ids_BT).logits.float(), model(ids_BT).logits.float()
    together = peft_model.add(model, "composed", composed)(ids_BT).logits.float()
    size = float(together.abs().max())
    pairs = {
        "parts_active_to_composed": (active, together),
        "composed_to_base": (together, plain),
        "composed_to_last_part": (together, alone),
    }
    differences = {name: float((one - other).abs().max()) / (size or 1.0) for name, (one, other) in pairs.items()}
    problems = []
    if not 0 < size < float("inf"):
        problems.append(Problem("the composed model's logits are zero or not finite", size, "use smaller weights"))
    if exact and not differences["parts_active_to_composed"] <= SAME_LOGITS:
        what = "all adapters active and the composed one differ"
        problems.append(Problem(what, differences["parts_active_to_composed"]))
    # what moves logits less than equal models differ could not be told from rounding; a merge asks for as much
    fix = f"of the largest logit it takes {SAME_LOGITS:g}: train longer, or give larger --weights"
    if not differences["composed_to_base"] > SAME_LOGITS:
        what = "the composed adapter does not change the model"
        problems.append(Problem(what, differences["composed_to_base"], fix))
    if any(parts[:-1]) and not differences["composed_to_last_part"] > SAME_LOGITS:
        problems.append(Problem("only the last adapter has an effect", differences["composed_to_last_part"], fix))
    if problems:
        raise VerificationError(problems)
    return differences


def ranks_differ(parts: Sequence[Factors]) -> bool:
    """Whether the sum of these adapters has modules of different ranks."""
    modules = {module for part in parts for module in part}
    return len({sum(part[module].rank for part in parts if module in part) for module in modules}) > 1


def layers_of(model: Any, adapted: Iterable[str]) -> dict[str, int]:
    """Path of every module in a decoder layer -> that layer's place in the model's own list of layers.

    Empty where not one list has all layers: nested ones, or one after the other, number them anew.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    outermost = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    holding = [(n, m) for n, m in outermost if any(name.startswith(f"{n}.") for name in adapted)]
    if len(holding) != 1:
        return {}
    ((path, layers),) = holding
    return {
        f"{path}.{key}.{name}": place
        for place, (key, layer) in enumerate(layers.named_children())
        for name in [*dict(layer.named_modules()), *dict(layer.named_parameters())]
    }


def refuse_inside(target: Path, base: BaseModel, adapters: Sequence[Run]) -> None:
    """Raises ArtefactError when an output would be written into one of its inputs."""
    for source in (base.directory, *(run.directory for run in adapters)):
        if target.resolve().is_relative_to(source.resolve()):
            raise ArtefactError(
                Problem(f"the output lies inside its input {source}", str(target), "choose another path")
            )


def refuse_models_inside(config: Config) -> None:
    """Raises ArtefactError when --run.models_dir lies inside an adapter folder that is read."""
    for source in filter(None, (config.inputs.domain_adapter, config.inputs.task_adapter, *config.compose.also)):
        if config.run.models_dir.resolve().is_relative_to(Path(source).resolve()):
            what = f"the output lies inside its input {source}"
            raise ArtefactError(Problem(what, str(config.run.models_dir), "choose another --run.models_dir"))


def refuse_recipe(recipe: Recipe, parts: Sequence[Factors]) -> None:
    """Raises ArtefactError when the weights are not as many as the method takes for these adapters."""
    try:
        weights_at("", recipe, len(parts), depth(parts))
    except ValueError as error:
        raise ArtefactError(
            Problem(f"these adapters do not compose: {error}", fix=flags.help_command("compose.weights"))
        ) from error


def _refuse_unplaced(recipe: Recipe, parts: Sequence[Factors], places: Mapping[str, int]) -> None:
    unplaced = sorted({module for part in parts for module in part} - set(places))
    if METHODS[recipe.method].per_adapter != 1 and unplaced:
        what = f"{recipe.method} weighs layers, and the model's list of layers does not hold {len(unplaced)} modules"
        raise VerificationError(Problem(what, unplaced[:3], f"--compose.method {SUM}"))


def _checked(factors: Factors, parts: Sequence[Factors], recipe: Recipe) -> FactorCheck:
    done = check(factors, methods.weighted(parts, recipe), exact=METHODS[recipe.method].exact)
    if done.problems:
        raise VerificationError([Problem(f"the composed adapter is not what it should be: {p}") for p in done.problems])
    return done
