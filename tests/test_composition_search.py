"""The weight search on losses with a known minimum, and the derivatives it and the interference figures rest on."""

from __future__ import annotations

import math
import unittest
from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest import mock

import numpy as np
import torch

from config import TrainSection
from tests.support import ARCHITECTURES, document_text, expert_factors, random_factors, relative
from utils.adapters import inference_layers, peft_model
from utils.adapters.factors import Factors
from utils.composition import dev_losses, interference
from utils.composition.methods import Recipe, compose
from utils.composition.search import ChosenWeights, search
from utils.composition.weights import dev_parts, measured_points
from utils.composition.weights.points import SURE, Keeping, Point, paired, pareto
from utils.data.batches import PackedDocuments
from utils.data.pair_rows import tokenise_pairs
from utils.inference import scoring
from utils.models.architectures import toy

ITEMS, DOCUMENTS, TOKENS = 60, 12, 5


def losses(
    answer: Callable[[str, tuple[float, ...]], float],
    domain: Callable[[tuple[float, ...]], float] | None = None,
    noise: float = 0.0,
) -> Callable[[str, tuple[float, ...]], Point]:
    """Dev losses per item; each item's own optimum lies `noise` away from the common one, in its own direction."""
    generator = np.random.default_rng(4)
    own = [noise * generator.normal(size=8) for _ in range(ITEMS)]
    documents = tuple(f"d{i % DOCUMENTS}" for i in range(ITEMS))

    def evaluate(method: str, weights: tuple[float, ...]) -> Point:
        moved = [tuple(w + o for w, o in zip(weights, offsets, strict=False)) for offsets in own]
        nlls = tuple(TOKENS * answer(method, at) for at in moved)
        of_documents = (domain(weights),) if domain else ()
        return Point(method, weights, nlls, (TOKENS,) * ITEMS, documents, of_documents, (1,) * len(of_documents))

    return evaluate


def bowl(a_d: float, a_t: float) -> Callable[[str, tuple[float, ...]], float]:
    return lambda method, weights: 2.0 + (weights[0] - a_d) ** 2 + 0.5 * (weights[1] - a_t) ** 2


def documents_at(nlls: Sequence[float]) -> Point:
    """Losses of dev documents of one token each."""
    return Point("sum", (0.0, 0.0), (1.0,), (1,), ("d",), tuple(float(n) for n in nlls), (1,) * len(nlls))


def find(
    evaluate: Callable[[str, tuple[float, ...]], Point], retention: float = 0.8, adapters: int = 2
) -> ChosenWeights:
    return search(evaluate, adapters, ("sum",), retention=retention)


class Search(unittest.TestCase):
    def test_minimum_of_a_smooth_loss_is_found_to_the_smallest_step(self) -> None:
        for a_d, a_t in ((0.5, 1.0), (0.3, 1.2), (1.9, 0.6), (0.0, 1.0)):
            chosen = find(losses(bowl(a_d, a_t))).chosen
            self.assertLessEqual(abs(chosen.weights[0] - a_d), 0.125, (a_d, a_t))
            self.assertLessEqual(abs(chosen.weights[1] - a_t), 0.125, (a_d, a_t))

    def test_a_third_adapter_is_refined_too(self) -> None:
        def loss(method: str, weights: tuple[float, ...]) -> float:
            return 2.0 + sum((w - best) ** 2 for w, best in zip(weights, (1.0, 0.75, 1.5), strict=True))

        for w, best in zip(find(losses(loss), adapters=3).chosen.weights, (1.0, 0.75, 1.5), strict=True):
            self.assertLessEqual(abs(w - best), 0.125)

    def test_weights_that_lose_the_domain_are_not_chosen_however_good_their_answers(self) -> None:
        # the domain's gain is in proportion to its weight, up to 1; answers want none of it
        domain = lambda weights: 3.0 - min(weights[0], 1.0)  # noqa: E731
        free = find(losses(bowl(0.0, 1.0), domain), retention=0.0).chosen
        bound = find(losses(bowl(0.0, 1.0), domain), retention=0.8)
        self.assertEqual(free.weights[0], 0.0)
        self.assertGreaterEqual(bound.chosen.weights[0], 0.8)
        self.assertLess(bound.chosen.weights[0], 1.0)
        self.assertEqual(bound.domain_gain, 1.0)
        self.assertIn("80% of the domain gain is kept", bound.reason)

    def test_weights_that_keep_the_domain_are_found_where_the_grid_has_none(self) -> None:
        # as measured on privacy policies: half of the task adapter already costs half of the domain's gain
        domain = lambda weights: 3.0 - weights[0] * (2 - weights[0]) + 2.0 * weights[1] ** 2  # noqa: E731
        found = find(losses(bowl(1.0, 1.0), domain), retention=0.9)
        self.assertEqual(found.chosen.weights, (1.0, 0.125))  # 2 / 64 is lost there, 2 / 16 at the next step
        self.assertIn("90% of the domain gain is kept", found.reason)
        self.assertIn("which costs 0.38 nats per answer token", found.reason)  # 0.5 (1 - 0.125) ** 2

    def test_where_no_weights_keep_the_domain_answers_alone_decide_and_the_reason_says_so(self) -> None:
        # kept by the domain adapter alone only at the weight 1 that any other weight of the task spoils
        found = find(losses(bowl(1.0, 1.0), lambda weights: 3.0 - (weights == (1.0, 0.0))), retention=0.9)
        self.assertEqual(found.chosen.weights, (1.0, 1.0))
        self.assertIn("no weights keep 90%", found.reason)
        self.assertNotIn("costs", found.reason)

    def test_without_a_domain_gain_nothing_has_to_be_kept_and_the_reason_says_so(self) -> None:
        worse = find(losses(bowl(0.0, 1.0), lambda weights: 3.0 + weights[0]))
        self.assertEqual(worse.chosen.weights[0], 0.0)
        self.assertIn("does not gain", worse.reason)
        self.assertIn("no dev documents", find(losses(bowl(0.5, 1.0))).reason)

    def test_plain_weights_win_when_searched_ones_are_within_one_standard_error(self) -> None:
        chosen = find(losses(bowl(0.9, 1.05), noise=0.8))
        self.assertEqual(chosen.chosen.weights, (1.0, 1.0))
        self.assertTrue(chosen.reason.startswith("sum at 1:"))
        far = find(losses(bowl(0.2, 1.0), noise=0.8))
        self.assertNotEqual(far.chosen.weights, (1.0, 1.0))

    def test_a_depth_gate_is_taken_only_when_it_is_clearly_better(self) -> None:
        def gated(method: str, weights: tuple[float, ...]) -> float:
            first, last = (weights[0], weights[1]) if method == "depth_gate" else (weights[0], weights[0])
            return 2.0 + (first - 0.5) ** 2 + (last - 1.5) ** 2

        def flat(method: str, weights: tuple[float, ...]) -> float:
            return 2.0 + (weights[0] - 0.5) ** 2

        methods = ("sum", "depth_gate")
        gate = search(losses(gated), 2, methods, retention=0.8).chosen
        self.assertEqual((gate.method, gate.weights[:2]), ("depth_gate", (0.5, 1.5)))
        self.assertEqual(search(losses(flat, noise=0.3), 2, methods, retention=0.8).chosen.method, "sum")

    def test_per_layer_weights_are_judged_on_documents_they_were_not_fitted_to(self) -> None:
        fitted: dict[tuple[float, ...], set[str]] = {}

        def fit(start: tuple[float, ...], documents: Sequence[str]) -> tuple[float, ...]:
            weights = (float(len(fitted)), 1.0, 1.0, 1.0)
            fitted[weights] = set(documents)
            return weights

        def evaluate(method: str, weights: tuple[float, ...]) -> Point:
            point = losses(bowl(0.5, 1.0))("sum", weights[:2])
            if method != "per_layer":
                return point
            # perfect on what it was fitted to, useless elsewhere: over-fitting in its purest form
            nlls = tuple(0.0 if c in fitted[weights] else 50.0 for c in point.clusters)
            return Point(method, weights, nlls, point.answer_tokens, point.clusters)

        found = search(evaluate, 2, ("sum", "per_layer"), retention=0.8, fit_per_layer=fit)
        self.assertEqual(found.chosen.method, "sum")
        crossed = next(c for c in found.champions if c.label == "per_layer")
        self.assertEqual(crossed.point.answer_nll, 10.0)

    def test_the_pareto_front_is_what_no_other_point_beats_twice(self) -> None:
        def point(domain: float, answer: float) -> Point:
            return Point("sum", (domain, answer), (answer,), (1,), ("d",), (domain,), (1,))

        points = [point(1, 5), point(2, 3), point(2, 4), point(3, 3), point(4, 1), point(5, 2)]
        self.assertEqual([p.weights for p in pareto(points)], [(1, 5), (2, 3), (4, 1)])

    def test_share_of_the_domain_gain(self) -> None:
        base, domain, half = (documents_at(nlls) for nlls in ((3.0, 6.0), (2.0, 4.0), (2.5, 5.0)))
        self.assertEqual(Keeping(base, domain, 0.5).share(half), (0.5, 0.0))
        self.assertEqual(Keeping(domain, base, 0.5).share(half)[0], math.inf)
        self.assertEqual(Keeping(base, domain, 0.5).gain, 1.5)

    def test_the_lower_limit_of_the_share_is_that_of_resampled_documents(self) -> None:
        generator = np.random.default_rng(5)
        gains = generator.gamma(4.0, 0.25, 300)
        kept = gains * (0.85 + 0.3 * generator.normal(size=300))
        base = documents_at(np.full(300, 4.0))
        keeping = Keeping(base, documents_at(4.0 - gains), 0.8)
        share, error = keeping.share(documents_at(4.0 - kept))
        drawn = generator.integers(0, 300, (4000, 300))
        resampled = kept[drawn].sum(1) / gains[drawn].sum(1)
        self.assertAlmostEqual(share, kept.sum() / gains.sum())
        self.assertAlmostEqual(share - SURE * error, float(np.quantile(resampled, 0.05)), delta=0.1 * error)

    def test_what_is_kept_has_to_be_sure_where_anything_is(self) -> None:
        """Half of the documents lose all that the domain's weight gives up, the other half nothing."""

        def evaluate(method: str, weights: tuple[float, ...]) -> Point:
            point = losses(bowl(0.0, 1.0))(method, weights)
            lost = 2.0 * max(0.0, 1.0 - weights[0])
            nlls = tuple(2.0 + (lost if i % 2 else 0.0) if weights[0] else 3.0 for i in range(10))
            return replace(point, document_nlls=nlls, document_tokens=(1,) * 10)

        # a share s has the standard error (1 - s) / 3 here, so s - 1.645 (1 - s) / 3 >= 0.8 from 0.871 on
        surely = find(evaluate)
        self.assertEqual(surely.chosen.weights[0], 0.875)
        self.assertIn("with 95% confidence over 10 documents", surely.reason)

    def test_where_nothing_is_sure_the_value_decides_and_the_reason_says_so(self) -> None:
        def evaluate(method: str, weights: tuple[float, ...]) -> Point:
            point = losses(bowl(0.0, 1.0))(method, weights)
            one_adapter = weights[1] == 0.0
            gains = (1.0, 1.0) if one_adapter else (1.3, 0.4)
            return replace(
                point, document_nlls=tuple(3.0 - g * min(1.0, weights[0]) for g in gains), document_tokens=(1, 1)
            )

        found = find(evaluate)
        self.assertGreaterEqual(found.chosen.weights[0], 0.8 / 0.85)
        self.assertIn("are no proof", found.reason)

    def test_a_single_document_is_no_proof_however_much_it_keeps(self) -> None:
        def evaluate(method: str, weights: tuple[float, ...]) -> Point:
            point = losses(bowl(0.0, 1.0))(method, weights)
            return replace(point, document_nlls=(3.0 - min(1.0, weights[0]),), document_tokens=(1,))

        found = find(evaluate)
        self.assertGreaterEqual(found.chosen.weights[0], 0.8)
        self.assertIn("whose 1 document is no proof", found.reason)

    def test_standard_error_is_that_of_whole_documents(self) -> None:
        """Against a cluster bootstrap; items of one document move together, so counting items would halve it."""
        generator = np.random.default_rng(0)
        documents = [f"d{i // 10}" for i in range(400)]
        effect = {d: generator.normal() for d in set(documents)}
        tokens = tuple(int(n) for n in generator.integers(3, 9, 400))
        first = tuple(2.0 * n + effect[d] + 0.3 * generator.normal() for n, d in zip(tokens, documents, strict=True))
        second = tuple(1.9 * n for n in tokens)
        difference, error = paired(
            Point("sum", (1.0, 1.0), first, tokens, tuple(documents)),
            Point("sum", (0.5, 1.0), second, tokens, tuple(documents)),
        )
        from utils.evaluation.intervals import ratio_interval

        deltas = [a - b for a, b in zip(first, second, strict=True)]
        interval = ratio_interval(deltas, tokens, documents, resamples=20_000, seed=1)
        self.assertAlmostEqual(difference, interval.estimate)
        self.assertAlmostEqual(error, (interval.high - interval.low) / (2 * 1.96), delta=0.1 * error)
        by_item = float(np.std(np.asarray(deltas) - difference * np.asarray(tokens)) * 20 / sum(tokens))
        self.assertGreater(error, 2 * by_item)


class ProbeOnAModel(unittest.TestCase):
    """Losses and derivatives on toys, against PEFT's layers and against differences."""

    def probe(self, architecture: str, weights_size: float = 0.1) -> dev_losses.DevProbe:
        model, tokenizer = ARCHITECTURES[architecture]()
        targets = ("q_proj", "o_proj")
        self.parts: list[Factors] = [
            random_factors(model, targets, 3, 6.0, 1, weights_size),
            random_factors(model, (*targets, "v_proj"), 2, 4.0, 2, weights_size),
        ]
        examples = [
            {"id": f"q{i}", "document": f"m{i // 2}", "question": f"What is f{i}?", "answers": [f"it is {i} and {i}"]}
            for i in range(8)
        ]
        from datasets import Dataset

        from utils.models import chat

        texts = [document_text(i) for i in range(3)]
        ids = chat.document_ids(tokenizer, texts)
        documents = Dataset.from_list(
            [
                {"id": f"d{i}", "text": t, "input_ids": x, "num_tokens": len(x), "utf8_bytes": len(t)}
                for i, (t, x) in enumerate(zip(texts, ids, strict=True))
            ]
        )
        rows = TrainSection(max_sequence_tokens=256, batch_tokens=512, micro_batch_tokens=512)
        pad = chat.pad_id(tokenizer)
        pairs, _ = tokenise_pairs(examples, tokenizer, "s", 400)
        questions, _ = scoring.questions(examples, tokenizer, "s", 400)
        data = dev_losses.DevData(
            questions, pairs, [e["document"] for e in examples], PackedDocuments(documents, rows, 0, pad), pad, 512
        )
        return dev_losses.DevProbe(model.eval().requires_grad_(False), self.parts, data)

    def test_losses_at_any_weights_are_those_of_the_adapter_composed_at_these_weights(self) -> None:
        for architecture in ARCHITECTURES:
            probe = self.probe(architecture)
            for method, weights in (("sum", (0.0, 0.0)), ("sum", (0.5, -1.0)), ("depth_gate", (1.0, 0.2, 0.0, 1.5))):
                found = probe.point(method, weights, measured_points.PART)
                fresh = ARCHITECTURES[architecture]()[0].eval().requires_grad_(False)
                if any(weights):
                    fresh = peft_model.add(fresh, "composed", compose(self.parts, Recipe(method, weights))).eval()
                    fresh.requires_grad_(False)
                data = probe.data
                common = {"batch_tokens": 512, "device": torch.device("cpu"), "what": "x"}
                items = scoring.score_questions(fresh, data.questions, pad_id=data.pad_id, **common)
                documents = scoring.score_documents(fresh, data.documents, **common)
                for a, b in zip(found.answer_nlls, items, strict=True):
                    self.assertAlmostEqual(a, b.answer_nll + b.end_nll, places=3)
                self.assertEqual(list(found.answer_tokens), [item.answer_tokens + 1 for item in items])
                domain = sum(d.nll for d in documents) / sum(d.tokens for d in documents)
                self.assertAlmostEqual(found.domain_nll or 0.0, domain, places=4)

    def test_the_part_and_the_rest_are_all_of_dev(self) -> None:
        probe = self.probe("llama")
        self.assertFalse(probe.data.has(measured_points.REST))
        whole = probe.point("sum", (1.0, 0.5), measured_points.PART)
        with mock.patch.object(dev_parts, "LEAST_PART", 2):
            self.assertTrue(probe.data.has(measured_points.REST))
            part, rest = (probe.point("sum", (1.0, 0.5), items) for items in (measured_points.PART, dev_losses.REST))
            documents = probe.point("sum", (1.0, 0.5), measured_points.REST_DOCUMENTS)
        self.assertEqual((len(part.answer_nlls), len(part.document_nlls)), (2, 2))
        self.assertEqual((documents.answer_nlls, documents.document_nlls), ((), rest.document_nlls))
        joined = part.and_rest(rest)
        for field in ("answer_nlls", "document_nlls"):
            for a, b in zip(sorted(getattr(joined, field)), sorted(getattr(whole, field)), strict=True):
                self.assertAlmostEqual(a, b, places=3)
        self.assertEqual(sorted(joined.clusters), sorted(whole.clusters))

    def test_changing_the_weights_neither_copies_nor_rebuilds_the_model(self) -> None:
        probe = self.probe("llama")
        before = [(name, id(module)) for name, module in probe.model.named_modules()]
        storage = [parameter.data_ptr() for parameter in probe.model.parameters()]
        first = probe.point("sum", (1.0, 1.0), measured_points.PART)
        probe.point("depth_gate", (0.1, 0.2, 0.3, 0.4), measured_points.PART)
        self.assertEqual(probe.point("sum", (1.0, 1.0), measured_points.PART), first)
        self.assertEqual([(name, id(module)) for name, module in probe.model.named_modules()], before)
        self.assertEqual([parameter.data_ptr() for parameter in probe.model.parameters()], storage)

    def test_derivatives_in_the_weights_are_those_of_small_differences(self) -> None:
        step = 1e-2
        for architecture in ARCHITECTURES:
            probe = self.probe(architecture, 0.05)
            here = torch.tensor([[0.7, 0.9], [1.0, 0.4]])
            for batches in (probe.answer_batches(), probe.document_batches()):
                _, gradient = probe.gradient(here, batches)
                for i in range(2):
                    for layer in range(2):
                        around = []
                        for sign in (-1, 1):
                            moved = here.clone()
                            moved[i, layer] += sign * step
                            around.append(probe.gradient(moved, batches)[0])
                        difference = (around[1] - around[0]) / (2 * step)
                        # a routing flip makes a step in MiniMax-M2's loss, so its differences are only near
                        tolerance = 2e-3 if architecture == "llama" else 2e-2
                        self.assertAlmostEqual(float(gradient[i, layer]), difference, delta=tolerance)

    def test_fitted_layer_weights_lower_the_loss_they_are_fitted_to(self) -> None:
        probe = self.probe("llama")
        documents = sorted(set(probe.data.pair_documents))
        weights = torch.tensor(probe.fit_per_layer((1.0, 1.0), documents)).view(2, 2)
        batches = probe.answer_batches()
        self.assertLess(probe.gradient(weights, batches)[0], probe.gradient(torch.ones(2, 2), batches)[0] - 0.05)

    def test_activation_figures_are_those_of_the_dense_updates(self) -> None:
        probe = self.probe("llama")
        batches = probe.answer_batches()
        inference_layers.select(probe.model, {})
        inputs: dict[str, list[torch.Tensor]] = {}
        name = "model.layers.1.self_attn.q_proj"
        handle = probe.model.get_submodule(name).register_forward_hook(
            lambda module, given, _: inputs.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]))
        )
        found = probe.overlaps(0, 1, batches)[name]
        handle.remove()
        x = torch.cat(inputs[name])
        d, t = ((x @ f.a_rI.T) @ f.b_Or.T * f.scale for f in (self.parts[0][name], self.parts[1][name]))
        w = x @ probe.model.get_submodule(name).base.weight.T
        self.assertAlmostEqual(found["first_to_base"], float(d.norm() / w.norm()), places=4)
        self.assertAlmostEqual(found["second_to_base"], float(t.norm() / w.norm()), places=4)
        self.assertAlmostEqual(found["cosine"], float((d * t).sum() / (d.norm() * t.norm())), places=4)

    def test_explanation_covers_every_layer_and_prints(self) -> None:
        probe = self.probe("minimax_m2")
        found = interference.explain(probe, Recipe(weights=(1.0, 0.5)))
        self.assertEqual({len(row) for d in found["derivatives"].values() for row in d["per_layer"]}, {2})
        self.assertEqual(set(found["derivatives"]), {"answer", "domain"})
        self.assertTrue(all(len(values) == 2 for values in found["per_layer"].values()))
        self.assertGreater(len(interference.lines(found)), 4)


class FrozenExperts(unittest.TestCase):
    def test_experts_without_a_selection_are_the_base(self) -> None:
        model = toy.tiny_minimax_m2()[0].eval()
        ids = torch.arange(20)[None]
        with torch.no_grad():
            before = model(input_ids=ids, use_cache=False).logits
            inference_layers.attach(model, {"x": expert_factors(model, 2, 4.0, 1)})
            changed = model(input_ids=ids, use_cache=False).logits
            inference_layers.select(model, {})
            after = model(input_ids=ids, use_cache=False).logits
        self.assertGreater(relative(changed, before), 0.1)
        self.assertLess(relative(after, before), 1e-6)


if __name__ == "__main__":
    unittest.main()
