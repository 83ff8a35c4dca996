"""What the dev split says about a composition: losses at any weights, their derivatives in the weights, activations.

One loaded base carries every adapter; changing the weights changes a few small matrices and nothing else.

Shapes: k adapters, L layers, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from config import BaseModelSection, ComposeSection, Config, TrainSection
from utils.adapters import adapter_tokenizer, inference_layers
from utils.adapters.factors import Factors
from utils.composition import search as weight_search
from utils.composition.methods import Recipe, depth, weights_at
from utils.composition.search import ChosenWeights
from utils.composition.weights.dev_parts import first_scored
from utils.composition.weights.measured_points import PART, REST, REST_DOCUMENTS, MeasuredPoints
from utils.composition.weights.points import Point
from utils.data.batches import Batch, BucketedPairs, PackedDocuments
from utils.data.pair_rows import tokenise_pairs
from utils.data.prepared import Prepared
from utils.data.splits import hash_share
from utils.exceptions import ArtefactError, DataError, NonFiniteError, Problem
from utils.inference import scoring
from utils.logger import event
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.models.losses import NextTokenLoss
from utils.models.parallel import ranks, work
from utils.models.rows import row_probe, row_support
from utils.models.structure import model_class
from utils.models.weights.tensor_names import layer_of
from utils.planning.stage_costs import SEARCHED_POINTS
from utils.progress import Progress, Whole

ROW_TOKENS, SHORT_ROW, ROW_STEP = 1024, 256, 64
FIT_STEPS, FIT_RATE = 8, 0.1


@dataclass(frozen=True)
class DevData:
    """Questions with their gold answers, and documents, both from dev; either may be missing."""

    questions: list[scoring.Question]
    pairs: list[Any]
    pair_documents: list[str]
    documents: PackedDocuments | None
    pad_id: int
    batch_tokens: int

    def has(self, items: str) -> bool:
        """Whether there is anything of the rest, or of its documents."""
        documents = len(self.documents.documents) if self.documents is not None else 0
        return any(len(first_scored(n)) < n for n in (documents, len(self.questions) if items == REST else 0))

    def scored(self, items: str) -> tuple[list[scoring.Question], PackedDocuments | None]:
        """Questions and documents of the part that is scored first, or of the rest, or the documents of that."""

        def of(count: int) -> list[int]:
            part = first_scored(count)
            return part if items == PART else sorted(set(range(count)) - set(part))

        chosen = of(len(self.questions)) if items != REST_DOCUMENTS else []
        questions, documents = [self.questions[i] for i in chosen], None
        if self.documents is not None and (chosen := of(len(self.documents.documents))):
            documents = PackedDocuments(self.documents.documents.select(chosen), self.documents.train, 0, self.pad_id)
        return questions, documents


def dev_data(config: Config, base: BaseModel, directory: Path, system_prompt: str) -> DevData:
    """Dev pairs and dev documents of prepared data, as tokens. Missing ones are left out."""
    tokenizer, section = adapter_tokenizer.of(base), config.compose
    source, pad = Prepared(directory), chat.pad_id(tokenizer)
    longest = model_class.longest_row(base.directory, config.evaluate.batch_tokens)
    try:
        examples = _some(source.examples("dev"), section.max_dev_items, config.run.seed)
    except ArtefactError:
        examples = []
    gold = [{**example, "choices": None, "answer_index": None} for example in examples]
    questions, _ = scoring.questions(gold, tokenizer, system_prompt, longest)
    pairs, _ = tokenise_pairs(gold, tokenizer, system_prompt, longest)
    document_of = {str(example["id"]): str(example["document"]) for example in gold}
    documents = None
    if (directory / "dev_documents").is_dir():
        dataset = source.documents("dev_documents")
        ids = dataset["id"][:]
        order = sorted(range(len(ids)), key=lambda i: hash_share(ids[i], config.run.seed))
        chosen = dataset.select(sorted(order[: section.max_dev_documents or len(order)]))
        documents = PackedDocuments(chosen, _rows_for(chosen["num_tokens"][:], longest), 0, pad)
    return DevData(questions, pairs, [document_of[p.name] for p in pairs], documents, pad, longest)


def search(probe: DevProbe | ranks.Held | None, section: ComposeSection, remembered: Path) -> ChosenWeights:
    """Weights chosen on dev. Each measured point is a line of `remembered`, so an interrupted search goes on.

    Raises DataError when there is nothing to choose on.
    """
    if probe is None or not probe.data.questions:
        raise DataError(
            Problem(
                "compose.search has no dev pairs to choose weights on, or too little memory for the model",
                fix="prepare data with --data.task FILE, on a machine that holds the model; or set --weights",
            )
        )
    least, most = SEARCHED_POINTS
    documents = len(probe.data.documents.documents) if probe.data.documents is not None else 0
    event(
        f"weight search of {', '.join(section.search_methods)}: {least} to {most} points",
        questions=len(probe.data.questions),
        documents=documents,
    )
    points = MeasuredPoints(probe, remembered)
    with Whole("weight search, at most", total=most, unit="point", counts_steps=True):
        choice = weight_search.search(
            points.on_all,
            len(probe.parts),
            section.search_methods,
            retention=section.domain_retention,
            fit_per_layer=lambda start, documents: probe.fit_per_layer(start, documents),
            **({"on_part": points.on_part, "on_documents": points.on_documents} if probe.data.has(REST) else {}),
        )
    for note in choice.notes:
        event("the weight search", note=note)
    return choice


def recipe_with(recipe: Recipe, choice: ChosenWeights) -> Recipe:
    """The recipe with what was chosen."""
    return replace(recipe, method=choice.chosen.method, weights=choice.chosen.weights)


class DevProbe:
    """The base with adapters on it, and dev data to ask it about; every rank may have one (`ranks.Held`)."""

    @classmethod
    def on(cls, base: BaseModel, section: BaseModelSection, parts: Sequence[Factors], data: DevData) -> DevProbe:
        """Load the base once."""
        return cls(row_probe.load_model(base, section), parts, data)

    def __init__(self, model: Any, parts: Sequence[Factors], data: DevData):
        self.names = [f"part{i}" for i in range(len(parts))]
        self.parts, self.data, self.layers = parts, data, depth(parts)
        self.model = inference_layers.attach(model, dict(zip(self.names, parts, strict=True))).eval()
        self.device = next(model.parameters()).device

    def point(self, method: str, weights: tuple[float, ...], items: str) -> Point:
        """Losses of a part of dev, or of the rest, at these weights."""
        recipe, data = Recipe(method, weights), self.data
        questions, packed = data.scored(items)
        inference_layers.select(
            self.model, lambda module: self._named(weights_at(module, recipe, len(self.parts), self.layers))
        )
        common = {"batch_tokens": data.batch_tokens, "device": self.device}
        what = f"{method} {', '.join(f'{w:g}' for w in weights[:4])}"
        answers = scoring.score_questions(self.model, questions, pad_id=data.pad_id, what=what, **common)
        documents = []
        if packed is not None:
            documents = scoring.score_documents(self.model, packed, what=what, **common)
        return Point(
            method,
            weights,
            tuple(item.answer_nll + item.end_nll for item in answers),
            tuple(item.answer_tokens + 1 for item in answers),
            tuple(item.document for item in answers),
            tuple(d.nll for d in documents),
            tuple(d.tokens for d in documents),
        )

    def gradient(self, weights_kL: torch.Tensor, batches: Sequence[Batch]) -> tuple[float, torch.Tensor]:
        """(mean NLL per label, its derivative (k, L)) in a weight per adapter and layer, by one backward pass each.

        Raises NonFiniteError.
        """
        loss_of, gradient = NextTokenLoss(self.model), torch.zeros_like(weights_kL)

        def derived(batch: Batch, share: float = 1.0) -> float:
            """The loss; its derivative is added here, as experts that ranks share have parts of other ranks' losses."""
            leaf = weights_kL.detach().clone().to(self.device).requires_grad_()
            inference_layers.select(self.model, lambda module, leaf=leaf: self._named(leaf[:, self._layer(module)]))
            loss = loss_of(*(t.to(self.device) for t in (batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT)))
            (loss * share).backward()
            gradient.add_(leaf.grad.cpu())
            return float(loss.detach())

        costs = [batch.input_ids_BT.numel() for batch in batches]
        losses = work.computed(batches, costs, derived, spare=lambda batch: derived(batch, 0.0))
        gradient, labels = sum(ranks.gathered(gradient)), sum(batch.num_labels for batch in batches)
        if not torch.isfinite(gradient).all():
            raise NonFiniteError(Problem("a derivative of the dev loss is NaN or infinite", fix="check the adapters"))
        return sum(losses) / labels, gradient / labels

    def fit_per_layer(self, start: Sequence[float], documents: Sequence[str]) -> tuple[float, ...]:
        """Weights per adapter and layer by gradient descent (Adam) on the dev pairs of these documents."""
        batches = self.answer_batches(set(documents))
        weights = torch.tensor(start)[:, None].repeat(1, self.layers)
        optimizer = torch.optim.Adam([weights], lr=FIT_RATE)
        with Progress("per-layer weights", total=FIT_STEPS, unit="step") as bar:
            for _ in range(FIT_STEPS):
                loss, weights.grad = self.gradient(weights, batches)
                optimizer.step()
                bar.advance(1, loss=loss)
        return tuple(round(float(w), 4) for w in weights.flatten())

    def answer_batches(self, documents: set[str] | None = None) -> list[Batch]:
        """Dev pairs as batches; only those of some documents, if given."""
        data = self.data
        kept = [p for p, d in zip(data.pairs, data.pair_documents, strict=True) if documents is None or d in documents]
        pairs = BucketedPairs(kept, _rows(ROW_TOKENS), 0, data.pad_id)
        return [pairs.batch(0, rows) for step in pairs.steps(0) for rows in step]

    def document_batches(self) -> list[Batch]:
        """Dev documents as batches."""
        documents = self.data.documents
        if documents and not row_support.of(self.model).packs:
            documents = documents.unpacked()
        return [documents.batch(0, rows) for step in documents.steps(0) for rows in step] if documents else []

    @torch.no_grad()
    def overlaps(self, first: int, second: int, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
        """Module -> how two updates D and T act on the same inputs: ||D x|| / ||W x||, ||T x|| / ||W x||, their cosine.

        Linear modules only: a fused expert sees its own tokens, and is compared by its factors.
        """
        here: dict[str, torch.Tensor] = {}
        handles = []

        def watch(name: str, module: inference_layers.FrozenLoraLinear) -> None:
            (a_d, b_d), (a_t, b_t) = (module.update.parts[self.names[i]] for i in (first, second))

            def measure(_: Any, inputs: tuple[torch.Tensor, ...], __: Any) -> None:
                x = inputs[0].reshape(-1, inputs[0].shape[-1]).to(a_d.dtype)
                d, t = (x @ a_d.mT) @ b_d, (x @ a_t.mT) @ b_t
                w = module.base(inputs[0]).float()
                w = w if module.base.bias is None else w - module.base.bias.float()
                products = torch.stack([(d * d).sum(), (t * t).sum(), (d * t).sum(), (w * w).sum()]).double().cpu()
                here[name] = here.get(name, torch.zeros(4, dtype=torch.float64)) + products

            handles.append(module.register_forward_hook(measure))

        for name, module in self.model.named_modules():
            if isinstance(module, inference_layers.FrozenLoraLinear) and {self.names[first], self.names[second]} <= set(
                module.update.parts
            ):
                watch(name, module)

        def summed(batch: Batch) -> dict[str, torch.Tensor]:
            here.clear()
            ids_BT, positions_BT = batch.input_ids_BT.to(self.device), batch.position_ids_BT.to(self.device)
            self.model(**row_support.arguments(self.model, ids_BT, positions_BT), logits_to_keep=1)
            return dict(here)

        try:
            parts = work.computed(batches, [batch.input_ids_BT.numel() for batch in batches], summed)
        finally:
            for handle in handles:
                handle.remove()
        sums: dict[str, torch.Tensor] = {}
        for part in parts:
            for name, partial_sums in part.items():
                sums[name] = sums.get(name, torch.zeros(4, dtype=torch.float64)) + partial_sums
        return {
            name: {
                "first_to_base": float((d / w).sqrt()),
                "second_to_base": float((t / w).sqrt()),
                "cosine": float(dot / (d * t).sqrt()) if d and t else 0.0,
            }
            for name, (d, t, dot, w) in sums.items()
        }

    def _named(self, weights: Any) -> dict[str, Any]:
        return {name: weights[i] for i, name in enumerate(self.names)}

    def _layer(self, module: str) -> int:
        layer = layer_of(module)
        return self.layers - 1 if layer is None else layer


def _rows_for(lengths: Sequence[int], longest: int) -> TrainSection:
    """Rows as long as the longest document needs: shorter ones are fuller, and attend to less that is masked."""
    row = min(longest, ROW_TOKENS, max(SHORT_ROW, -(-max(lengths, default=1) // ROW_STEP) * ROW_STEP))
    return _rows(longest).model_copy(update={"max_sequence_tokens": row})


def _rows(tokens: int) -> TrainSection:
    size = min(tokens, ROW_TOKENS)
    return TrainSection(max_sequence_tokens=size, batch_tokens=max(tokens, size), micro_batch_tokens=max(tokens, size))


def _some(examples: list[dict[str, Any]], limit: int, seed: int) -> list[dict[str, Any]]:
    order = sorted(examples, key=lambda example: hash_share(str(example["id"]), seed))
    return order[: limit or len(order)]
