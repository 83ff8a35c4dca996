"""A tiny MiniMax-M2 through every script: bfloat16 and FP8, all regimes, with and without experts; vLLM's rules.

`make test` goes three ways through the grid; all twelve take about five minutes: `make minimax-test`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import unittest
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from config import ATTENTION
from tests import minimax_support, vllm_rules
from tests.minimax_support import FLOAT32, Kind
from tests.support import Workspace, last_json, plain_logits, relative, temporary_directory
from utils.adapters import adapter_files, peft_model
from utils.adapters.factors import delta
from utils.artifacts import files
from utils.models import loading, older_spellings

ALL = os.environ.get("MINIMAX_TESTS") == "all"
REGIMES = ("base", "domain", "domain_ready")
RANK, EXPERTS, LAYERS = 4, 4, 2
# q (256, 128), k and v (128, 128), o (128, 256); each expert: gate and up (256, 128), down (128, 128)
ON_ATTENTION = LAYERS * RANK * ((256 + 128) + 2 * (128 + 128) + (128 + 256))
ON_EXPERTS = LAYERS * EXPERTS * RANK * ((256 + 128) + (128 + 128))


@dataclass(frozen=True)
class Route:
    """One way through the grid. Attention is always adapted; `experts` says for which stages the experts are too."""

    kind: Kind
    on: str
    experts: tuple[str, ...] = ()
    merged: str = "base"
    evaluated: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.on}-{'-'.join(self.experts) or 'attention'}"

    def flags(self, stage: str) -> list[str]:
        """The base model, and where the experts are adapted, in the way of `stage`."""
        source = ["--base.source", str(minimax_support.checkpoint(self.kind)), "--base.dtype", "bfloat16"]
        return [*source, *(f"--{s}.lora.experts=true" for s in self.experts if s in (stage, "domain"))]


SOME = [
    Route("fp8", "domain", ("task",)),
    Route("bfloat16", "domain_ready", ("domain", "task"), merged="bfloat16", evaluated=False),
    Route("fp8", "base", merged="fp8", evaluated=False),
]
GRID = [
    Route(kind, on, experts, merged=merged)
    for kind, merged in (("bfloat16", "bfloat16"), ("fp8", "fp8"))
    for on in REGIMES
    for experts in ((), ("domain", "task"))
]
ROUTES = SOME + GRID if ALL else SOME


@functools.cache
def place() -> Workspace:
    """The one workspace: data prepared once, for the tokenizer that all these models share."""
    made = Workspace()
    made.prepare()
    return made


@functools.cache
def domain(kind: Kind, experts: bool) -> dict[str, Any]:
    route = Route(kind, "domain", ("domain",) if experts else ())
    flags = [*route.flags("domain"), "--domain.train.max_steps=3", "--domain.train.learning_rate=0.01"]
    return last_json(place().run("train_domain_adapter", *flags))


@functools.cache
def task(route: Route) -> dict[str, Any]:
    """Five steps: of the regime `domain_ready` some have the domain adapter on, and some off."""
    below = domain(route.kind, "domain" in route.experts)
    flags = [*route.flags("task"), "--task.on", route.on, "--domain_adapter", below["run"]]
    train = {"max_steps": 5, "epochs": 3, "batch_tokens": 512, "learning_rate": 0.01}
    said = [f"--task.train.{name}={value}" for name, value in train.items()]
    return last_json(place().run("train_task_adapter", *flags, *said))


@functools.cache
def finished(route: Route) -> dict[str, dict[str, Any]]:
    """What each script after training reported."""
    adapters_of = ["--domain_adapter", domain(route.kind, "domain" in route.experts)["run"]]
    common = [*route.flags("task"), "--task.on", route.on, *adapters_of, "--task_adapter", task(route)["run"]]
    target = place().root / f"merged-{route.name}-{route.merged}"
    found = {
        "composed": place().run("compose", *common, "--weights", "0.7,1"),
        "answered": place().run("inference", *common, "--prompt", "What does f1 do?"),
        "merged": place().run("inference", *common, "--merge_path", str(target), "--merge.dtype", route.merged),
    }
    if route.evaluated:
        found["evaluated"] = place().run("evaluate", *common)
    return {name: last_json(done) for name, done in found.items()}


class Scripts(unittest.TestCase):
    def routes(self) -> Iterator[Route]:
        for route in ROUTES:
            with self.subTest(route.name):
                yield route

    def test_every_route_trains_what_was_asked_for_and_leaves_the_domain_adapter_as_it_was(self) -> None:
        for route in self.routes():
            for stage, trained in (("domain", domain(route.kind, "domain" in route.experts)), ("task", task(route))):
                expected = ON_ATTENTION + (ON_EXPERTS if stage in route.experts else 0)
                weights = load_file(Path(trained["adapter"]) / "adapter_model.safetensors")
                self.assertEqual(sum(tensor.numel() for tensor in weights.values()), expected, stage)
                self.assertTrue(all(tensor.any() and tensor.isfinite().all() for tensor in weights.values()), stage)
                self.assertEqual(files.verify(Path(trained["run"]), hash_files=True)["digest"], trained["digest"])
            manifest = files.read_manifest(Path(task(route)["run"]))
            self.assertEqual((manifest["identity"]["on"], manifest["identity"]["dtype"]), (route.on, "torch.bfloat16"))
            kinds = [parent["kind"] for parent in manifest["parents"]]
            self.assertEqual(kinds, ["prepared"] if route.on == "base" else ["prepared", "domain"])

    def test_every_route_composes_exactly_answers_is_scored_and_merges(self) -> None:
        for route in self.routes():
            found = finished(route)
            self.assertTrue(found["composed"]["exact"])
            self.assertLess(found["composed"]["relative_error"], 1e-5)
            self.assertEqual(found["answered"]["adapters"], found["composed"]["adapters"])
            self.assertLess(found["merged"]["max_weight_difference"], 1e-4)
            # 4 matrices of attention, and 3 of each expert where a stage adapts them, in each layer
            changed = LAYERS * (4 + (3 * EXPERTS if route.experts else 0))
            self.assertEqual(found["merged"]["tensors_changed"], changed)
            if route.evaluated:
                results = json.loads((Path(found["evaluated"]["run"]) / "results.json").read_text())
                self.assertIn(found["evaluated"]["verdict"], ("helps", "coexists", "interferes", "undecided"))
                self.assertNotIn("NaN", json.dumps(results))

    def test_a_merged_model_reloaded_without_peft_is_base_and_both_adapters(self) -> None:
        targets = {route: finished(route)["merged"]["merged"] for route in ROUTES}
        ids = torch.arange(8, 40)[None]
        reloaded = plain_logits(ids, *targets.values(), flags=["--tokenizer"])
        for route in self.routes():
            base = minimax_support.fetched(route.kind)
            model = loading.load_model(base, minimax_support.section(route.kind), dtype=torch.float32)
            composed = adapter_files.load(Path(finished(route)["composed"]["adapter"]), base)
            with torch.no_grad():
                before = model(ids, use_cache=False).logits
                wanted = peft_model.add(model, "composed", composed)(ids, use_cache=False).logits
            self.assertGreater(relative(before, wanted), 0.05, "the adapters do nothing")
            # what rounding takes of the adapters' effect: measured 0.010 to 0.013 in bfloat16, 0.16 to 0.50 in FP8
            off = float((reloaded[targets[route]] - wanted).norm() / (before - wanted).norm())
            self.assertLess(off, 0.7 if route.merged == "fp8" else 0.03)
            for path in Path(targets[route]).glob("*.safetensors"):
                for name, tensor in load_file(path).items():
                    if name.endswith(FLOAT32):
                        self.assertEqual(tensor.dtype, torch.float32, name)

    def test_a_task_adapter_whose_domain_adapter_was_dropped_is_not_trained(self) -> None:
        route = SOME[0]
        below = domain(route.kind, False)["run"]
        command = [*route.flags("task"), "--domain_adapter", below, "--run.name", "dropped"]
        script = place().start("train_task_adapter", *command, before=Dropped())
        done = script.wait()
        self.assertEqual(done.returncode, 4, done.stderr[-2000:])
        self.assertIn("adapter domain is off and should not be, in 8 modules", done.stderr)
        self.assertFalse((place().models / "task" / "dropped" / "adapter").exists())


@dataclass(frozen=True)
class Dropped:
    """What a trainer's resume does: the first adapter alone is switched on, after ours had switched on both."""

    def __call__(self) -> None:
        from utils.training import training_loop

        resume = training_loop._TrainingLoop.resume

        def resumed(loop: Any) -> None:
            resume(loop)
            loop.model.set_adapter("task")

        training_loop._TrainingLoop.resume = resumed


class Serving(unittest.TestCase):
    def merged(self, kind: Kind, dtype: str) -> Path:
        (route,) = (r for r in SOME if r.kind == kind and r.merged == dtype)
        return Path(finished(route)["merged"]["merged"])

    def test_what_we_publish_is_what_vllm_loads(self) -> None:
        for kind, dtype, stored in (("bfloat16", "bfloat16", None), ("fp8", "base", None), ("fp8", "fp8", "fp8")):
            with self.subTest(kind, dtype=dtype):
                directory = self.merged(kind, dtype)
                self.assertEqual(vllm_rules.problems_of_model(directory), [])
                settings = json.loads((directory / "config.json").read_text())
                self.assertEqual(settings.get("quantization_config", {}).get("quant_method"), stored)
                # everything else is as it was published
                original = json.loads((minimax_support.checkpoint(kind) / "config.json").read_text())
                changed = {"quantization_config", "dtype", "auto_map", "torch_dtype", older_spellings.LISTED}
                self.assertEqual(
                    {k: v for k, v in settings.items() if k not in changed},
                    {k: v for k, v in original.items() if k not in changed},
                )

    def test_adapters_have_vllm_s_names_and_its_one_scale_is_theirs(self) -> None:
        settings = json.loads((minimax_support.checkpoint("fp8") / "config.json").read_text())
        attention, mixed = SOME[2], SOME[0]
        base = minimax_support.fetched("fp8")
        for name, directory, experts in (
            ("domain", domain("fp8", False)["adapter"], False),
            ("task", task(attention)["adapter"], False),
            ("composed", finished(attention)["composed"]["adapter"], False),
            ("per expert", Path(finished(mixed)["composed"]["composed"]) / "adapter_per_expert", True),
        ):
            with self.subTest(name):
                self.assertEqual(vllm_rules.problems_of_adapter(Path(directory), settings, experts=experts), [])
                served = vllm_rules.updates(Path(directory), experts=experts, settings=settings)
                ours = adapter_files.load(Path(directory), base)
                for module in (module for module in ours if module.rpartition(".")[2] in ATTENTION):
                    self.assertLess(relative(served[f"{module}.weight"], delta(ours[module])), 1e-5, module)
                for layer in range(LAYERS if experts else 0):
                    place_ = f"model.layers.{layer}.block_sparse_moe.experts"
                    for expert in range(EXPERTS):
                        pair = [served[f"{place_}.{expert}.{leaf}.weight"] for leaf in ("w1", "w3")]
                        fused = delta(ours[f"model.layers.{layer}.mlp.experts.gate_up_proj"])[expert]
                        self.assertLess(relative(torch.cat(pair), fused), 1e-5)

    def test_adapters_of_unequal_targets_ranks_and_weights_keep_one_scale_when_they_are_composed(self) -> None:
        from tests.support import random_factors
        from utils.composition.methods import Recipe, compose

        base = minimax_support.fetched("fp8")
        settings = json.loads((base.directory / "config.json").read_text())
        model = loading.load_model(base, minimax_support.section("fp8"))
        parts = [random_factors(model, ("q_proj", "o_proj"), 4, 8, 1), random_factors(model, ATTENTION, 3, 5, 2)]
        directory = temporary_directory()
        adapter_files.save(directory, made := compose(parts, Recipe(weights=(0.5, 1.0))), base)
        self.assertEqual(vllm_rules.problems_of_adapter(directory, settings, experts=False), [])
        served = vllm_rules.updates(directory, experts=False, settings=settings)
        self.assertEqual(served.keys(), {f"{name}.weight" for name in made})
        for name, factors in made.items():
            self.assertLess(relative(served[f"{name}.weight"], delta(factors)), 1e-5, name)

    def test_the_rules_see_each_kind_of_damage(self) -> None:
        whole = self.merged("fp8", "fp8")
        file = "model-00001-of-00002.safetensors"
        gate, bias = (f"model.layers.0.block_sparse_moe.{end}" for end in ("gate.weight", "e_score_correction_bias"))
        expert = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
        for said, settings, change in (
            (f"{gate} is ('BF16'", {}, lambda s: s.update({gate: s[gate].bfloat16()})),
            (f"{bias} is missing", {}, lambda s: s.pop(bias)),
            (f"{expert}_scale_inv is missing", {}, lambda s: s.pop(f"{expert}_scale_inv")),
            ("is no tensor of this model", {}, lambda s: s.update({"model.layers.0.mlp.gate.weight": s.pop(gate)})),
            ("config.json lacks rotary_dim", {"rotary_dim": None}, None),
            ("use_routing_bias is None", {"use_routing_bias": None}, None),
            ("config.json has none of", {"rope_theta": None}, None),
            ("auto_map names code", {"auto_map": {"AutoConfig": "x.Y"}}, None),
        ):
            with self.subTest(said):
                copy = temporary_directory() / "copy"
                shutil.copytree(whole, copy)
                found = json.loads((copy / "config.json").read_text()) | settings
                (copy / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
                if change:
                    state = load_file(copy / file)
                    change(state)
                    save_file(state, copy / file)
                self.assertIn(said, "\n".join(vllm_rules.problems_of_model(copy)))
        fused = Path(task(SOME[0])["adapter"])  # PEFT's own spelling of experts
        settings = json.loads((whole / "config.json").read_text())
        told = vllm_rules.problems_of_adapter(fused, settings, experts=True)
        self.assertIn("experts.base_layer.lora_A.weight is no name that vLLM maps", "\n".join(told))


if __name__ == "__main__":
    unittest.main()
