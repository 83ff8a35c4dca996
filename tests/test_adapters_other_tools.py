"""Adapters of other tools: found where those tools put them, read as those tools read them, composed, or refused."""

from __future__ import annotations

import functools
import json
import shutil
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from config import BaseModelSection, Config, tiny_minimax_m2
from tests.support import Completed, Workspace, last_json, relative, saved_model, temporary_directory
from utils import logger
from utils.adapters import adapter_config, adapter_files, parent_runs, peft_model
from utils.adapters.factors import Factors, delta
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run
from utils.composition.methods import Recipe, compose
from utils.exceptions import ArtefactError
from utils.models import chat, loading, sources
from utils.models.base_model import BaseModel

State = dict[str, torch.Tensor]

CONFIG, WEIGHTS = adapter_config.CONFIG, adapter_config.WEIGHTS
LLAMA, MINIMAX = "llama", "minimax_m2"
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
IDS = torch.randint(8, 700, (2, 24), generator=torch.Generator().manual_seed(3))
# the same weights twice, in other words: float32 rounding; two different models: at least this far apart
ROUNDING, AN_EFFECT = 1e-5, 0.1


def setUpModule() -> None:
    unittest.enterModuleContext(warnings.catch_warnings())
    warnings.simplefilter("ignore")  # of PEFT's, that it ignores rank patterns of experts: it does not


@functools.cache
def base_of(architecture: str, seed: int = 0) -> BaseModel:
    return saved_model(architecture, seed=seed)


def fresh(base: BaseModel) -> Any:
    return loading.load_model(base, BaseModelSection(source=str(base.directory), dtype="float32"))


def lora(rank: int = 4, alpha: float = 8, targets: Any = ("q_proj", "v_proj"), **more: Any) -> LoraConfig:
    targets = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(**({"task_type": "CAUSAL_LM"} | more), r=rank, lora_alpha=alpha, target_modules=targets)


def made_by_peft(base: BaseModel, config: LoraConfig, name: str = "default", seed: int = 0) -> PeftModel:
    """Stock PEFT with one adapter as training leaves it: A and B random, neither small."""
    model = get_peft_model(fresh(base), config, adapter_name=name)
    trained(model, seed)
    return model


@torch.no_grad()
def trained(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def written(base: BaseModel, config: LoraConfig, directory: Path | None = None, seed: int = 0) -> Path:
    """What stock PEFT's save_pretrained writes."""
    directory = directory or temporary_directory() / "adapter"
    made_by_peft(base, config, seed=seed).save_pretrained(directory)
    return directory


def changed(
    source: Path, settings: Mapping[str, Any] | None = None, tensors: Callable[[State], object] | None = None
) -> Path:
    """A copy of an adapter with some settings replaced, and its tensors passed through a function."""
    directory = temporary_directory() / "changed"
    shutil.copytree(source, directory)
    if settings is not None:
        found = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**found, **settings}))
    if tensors is not None:
        state = load_file(directory / WEIGHTS)
        tensors(state)
        save_file(state, directory / WEIGHTS)
    return directory


def without(part: str) -> Callable[[State], None]:
    def remove(state: State) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return remove


def with_extra_module(state: State) -> None:
    """A pair for a module that the adapter's settings do not name."""
    place = next(name for name in state if "layers.0" in name and "q_proj.lora_A" in name)
    for name in (place, place.replace("lora_A", "lora_B")):
        state[name.replace("q_proj", "o_proj")] = state[name].clone()


def with_zero_b(state: State) -> None:
    for name in state:
        state[name] = state[name] * (0.0 if "lora_B" in name else 1.0)


def with_nan(state: State) -> None:
    next(iter(state.values())).view(-1)[3] = float("nan")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


@torch.no_grad()
def by_hand(base: BaseModel, *parts: Factors) -> torch.Tensor:
    """Logits of the base with the dense updates added to its weights."""
    model = fresh(base)
    weights = {name.removesuffix(".weight"): parameter for name, parameter in model.named_parameters()}
    for part in parts:
        for name, f in part.items():
            weights[name] += delta(f)
    return logits(model)


def settings_for(models: Path) -> Config:
    config = tiny_minimax_m2()
    return config.model_copy(update={"run": config.run.model_copy(update={"models_dir": models})})


def foreign(base: BaseModel, path: Path) -> Run:
    return parent_runs.external_run(settings_for(temporary_directory()), base, "domain", path)


class Refusals(unittest.TestCase):
    @contextmanager
    def refused(self, *parts: str) -> Iterator[None]:
        with self.assertRaises(ArtefactError) as caught:
            yield
        for part in parts:
            self.assertIn(part, str(caught.exception))


class Found(Refusals):
    """`find`: what a person has in their hands is a folder; which one holds the adapter is our business."""

    def adapter(self, *places: str) -> Path:
        root = temporary_directory()
        for place in places:
            written(base_of(LLAMA), lora(), root / place)
        return root

    def test_folder_that_save_pretrained_wrote(self) -> None:
        root = self.adapter("")
        self.assertEqual(adapter_files.find(root), root)

    def test_adapter_under_another_name_is_found_in_the_sub_folder_where_peft_puts_it(self) -> None:
        root = temporary_directory()
        made_by_peft(base_of(LLAMA), lora(), "legal").save_pretrained(root)
        self.assertFalse((root / CONFIG).exists())
        self.assertEqual(adapter_files.find(root), root / "legal")
        self.assertEqual(len(adapter_files.load(adapter_files.find(root), base_of(LLAMA))), 2 * 2)

    def test_two_adapters_in_sub_folders_are_not_chosen_between(self) -> None:
        model = made_by_peft(base_of(LLAMA), lora(), "domain")
        model.add_adapter("task", lora())
        root = temporary_directory()
        model.save_pretrained(root)
        with self.refused(str(root), "several adapters (domain, task)", f"e.g. {root / 'task'}"):
            adapter_files.find(root)
        self.assertEqual(adapter_files.find(root / "domain"), root / "domain")

    def test_in_a_trainers_output_the_final_adapter_wins_over_its_checkpoints(self) -> None:
        root = self.adapter("", "checkpoint-10", "checkpoint-20")
        self.assertEqual(adapter_files.find(root), root)

    def test_checkpoints_without_a_final_adapter_are_named_and_not_chosen_between(self) -> None:
        root = self.adapter("checkpoint-10", "checkpoint-20")
        with self.refused(str(root), "checkpoint-10, checkpoint-20", f"e.g. {root / 'checkpoint-20'}"):
            adapter_files.find(root)
        self.assertEqual(adapter_files.find(root / "checkpoint-20"), root / "checkpoint-20")

    def test_real_trainer_output_is_read_at_its_top(self) -> None:
        from datasets import Dataset
        from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

        root, rows = temporary_directory() / "out", {"input_ids": IDS.tolist(), "labels": IDS.tolist()}
        arguments = TrainingArguments(
            output_dir=str(root),
            max_steps=2,
            per_device_train_batch_size=1,
            learning_rate=0.1,
            save_steps=1,
            use_cpu=True,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = get_peft_model(fresh(base_of(LLAMA)), lora())
        data = Dataset.from_dict(rows)
        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=default_data_collator)
        trainer.remove_callback(PrinterCallback)
        with logger.quiet_transformers():
            trainer.train()
            trainer.save_model()
        self.assertEqual({p.name for p in root.glob("checkpoint-*")}, {"checkpoint-1", "checkpoint-2"})
        self.assertEqual(adapter_files.find(root), root)
        factors = adapter_files.load(adapter_files.find(root), base_of(LLAMA))
        self.assertLess(relative(by_hand(base_of(LLAMA), factors), logits(model)), ROUNDING)
        (root / CONFIG).unlink()  # as when the final save_model was forgotten
        with self.refused("checkpoint-1, checkpoint-2"):
            adapter_files.find(root)

    def test_pickled_weights_are_refused(self) -> None:
        root = temporary_directory()
        made_by_peft(base_of(LLAMA), lora()).save_pretrained(root, safe_serialization=False)
        self.assertEqual(adapter_files.find(root), root)
        with self.refused(str(root), f"it needs {CONFIG} and {WEIGHTS}", "adapter_model.bin", "pickled"):
            adapter_files.load(root)
        with self.refused("pickled weights are refused", "save_file("):
            foreign(base_of(LLAMA), root)

    def test_run_directory_of_ours_and_its_adapter_folder_are_the_same_adapter(self) -> None:
        run = own_run(temporary_directory() / "domain" / "mine", "domain", base_of(LLAMA))
        written(base_of(LLAMA), lora(), run.directory / "adapter_per_expert")  # as composed runs have one
        run = Run(run.directory, files.seal(run.directory, run.manifest))
        self.assertEqual(adapter_files.find(run.directory), run.adapter)
        self.assertEqual(adapter_files.find(run.adapter), run.adapter)
        for path in (run.directory, run.adapter):
            config = settings_for(run.directory.parents[1])
            config = config.model_copy(
                update={"inputs": config.inputs.model_copy(update={"domain_adapter": str(path)})}
            )
            found = parent_runs.domain_run(config, base_of(LLAMA))
            self.assertEqual((found.directory, found.digest), (run.directory, run.digest))

    def test_unfinished_run_of_ours_is_not_taken_for_an_adapter_of_another_tool(self) -> None:
        run = own_run(temporary_directory() / "domain" / "mine", "domain", base_of(LLAMA))
        (run.directory / files.MANIFEST).unlink()
        files.write_json(run.directory / "identity.json", {})
        for path in (run.directory, run.adapter):
            with self.refused(f"{run.directory} is an unfinished run", "run the same training command again"):
                foreign(base_of(LLAMA), path)

    def test_wrong_path_is_told_where_was_looked_and_what_was_there(self) -> None:
        root = temporary_directory()
        missing = root / "missing"
        with self.refused(f"looked for {CONFIG} in {missing}, {missing / 'adapter'} and its", "no such directory"):
            adapter_files.find(missing)
        with self.refused(f"looked for {CONFIG} in {root}", "nothing"):
            adapter_files.find(root)
        (root / "pytorch_model.bin").write_bytes(b"")
        (root / "deeper" / "still").mkdir(parents=True)
        written(base_of(LLAMA), lora(), root / "deeper" / "still" / "adapter")  # too deep: could be anything's
        with self.refused(f"looked for {CONFIG} in {root}", "deeper, pytorch_model.bin", "save_pretrained"):
            adapter_files.find(root)
        with self.refused("no adapter in PEFT's format", "no such directory"):
            adapter_files.find(root / "pytorch_model.bin")


class Read(unittest.TestCase):
    """What we read is what PEFT reads: logits of base + our update against PEFT's own loading of the same folder."""

    def assert_read_as_peft_reads_it(self, directory: Path, base: BaseModel, modules: int) -> Factors:
        found = adapter_files.load(directory, base)
        expected = logits(PeftModel.from_pretrained(fresh(base), str(directory)))
        self.assertGreater(relative(expected, logits(fresh(base))), AN_EFFECT, "the adapter does nothing")
        self.assertLess(relative(by_hand(base, found), expected), ROUNDING)
        self.assertEqual(len(found), modules)
        # and composed with another one, through our writing and PEFT's reading again
        other = adapter_files.load(written(base, lora(3, 5, ("q_proj", "o_proj")), seed=1), base)
        composed = compose([found, other], Recipe(weights=(0.8, 1.2)))
        expected = by_hand(base, *(compose([part], Recipe(weights=(w,))) for part, w in ((found, 0.8), (other, 1.2))))
        self.assertLess(relative(logits(peft_model.add(fresh(base), "composed", composed)), expected), ROUNDING)
        return found

    def test_ranks_scales_and_targets_in_every_spelling(self) -> None:
        first_q, second_v = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
        cases: dict[str, tuple[LoraConfig, int, dict[str, tuple[int, float]]]] = {
            "plain": (lora(), 4, {first_q: (4, 8 / 4)}),
            "rsLoRA": (lora(use_rslora=True), 4, {first_q: (4, 8 / 4**0.5)}),
            "patterns by leaf": (
                lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
                4,
                {first_q: (2, 8 / 2), second_v: (4, 3 / 4)},
            ),
            "patterns by regular expression": (
                lora(rank_pattern={r"^model\.layers\.0\..*": 2}, alpha_pattern={r".*\.1\..*v_proj": 3}),
                4,
                {first_q: (2, 8 / 2), second_v: (4, 3 / 4)},
            ),
            "patterns by full path": (
                lora(rank_pattern={first_q: 2}, alpha_pattern={second_v: 3, "layers.0.self_attn.q_proj": 5}),
                4,
                {first_q: (2, 5 / 2), second_v: (4, 3 / 4), "model.layers.1.self_attn.q_proj": (4, 8 / 4)},
            ),
            # first in the file, that is: PEFT sorts the patterns when it writes them
            "the first pattern that matches up to the end": (
                lora(rank_pattern={"layers.0": 7, "proj": 7, "q_proj": 2, "self_attn.q_proj": 7}),
                4,
                {first_q: (2, 8 / 2), second_v: (4, 8 / 4)},
            ),
            "patterns and rsLoRA": (
                lora(use_rslora=True, rank_pattern={"q_proj": 9}),
                4,
                {first_q: (9, 8 / 3), second_v: (4, 8 / 2)},
            ),
            "one layer": (lora(layers_to_transform=[1]), 2, {second_v: (4, 2)}),
            "one layer, as a number": (lora(layers_to_transform=1), 2, {second_v: (4, 2)}),
            "all but one": (lora(exclude_modules=["layers.0.self_attn.v_proj"]), 3, {first_q: (4, 2)}),
        }
        for architecture in (LLAMA, MINIMAX):
            for what, (config, modules, expected) in cases.items():
                with self.subTest(what, architecture=architecture):
                    base = base_of(architecture)
                    found = self.assert_read_as_peft_reads_it(written(base, config), base, modules)
                    for module, (rank, scale) in expected.items():
                        self.assertEqual(found[module].rank, rank)
                        self.assertAlmostEqual(found[module].scale, scale)

    def test_targets_as_a_regular_expression(self) -> None:
        pattern = r".*layers\.1\.self_attn\.(q|v)_proj"
        directory = written(base_of(LLAMA), lora(targets=pattern))
        self.assertEqual(json.loads((directory / CONFIG).read_text())["target_modules"], pattern)
        self.assert_read_as_peft_reads_it(directory, base_of(LLAMA), 2)
        # transformers widens it to all layers of a mixture of experts and PEFT writes down the names it became
        self.assert_read_as_peft_reads_it(written(base_of(MINIMAX), lora(targets=pattern)), base_of(MINIMAX), 4)

    def test_all_linear_modules(self) -> None:
        # q, k, v, o, gate, up and down in two layers; with experts: q, k, v, o, both fused parameters and the router
        for architecture in (LLAMA, MINIMAX):
            base = base_of(architecture)
            self.assert_read_as_peft_reads_it(written(base, lora(targets="all-linear")), base, 2 * 7)

    def test_fused_experts_with_one_and_with_both_parameters(self) -> None:
        base = base_of(MINIMAX)
        cases: dict[str, tuple[dict[str, Any], int]] = {
            "both": ({"target_parameters": [GATE_UP, DOWN]}, 4),
            "both, named the other way round": ({"target_parameters": [DOWN, GATE_UP]}, 4),
            "only down_proj": ({"target_parameters": [DOWN]}, 2),
            "only gate_up_proj, by its leaf": ({"target_parameters": ["gate_up_proj"]}, 2),
            "one layer": ({"target_parameters": [f"model.layers.1.{GATE_UP}"]}, 1),
            "own ranks": (
                {
                    "target_parameters": [GATE_UP, DOWN],
                    "rank_pattern": {"down_proj": 3},
                    "alpha_pattern": {"down_proj": 2},
                },
                4,
            ),
            "rsLoRA": ({"target_parameters": [GATE_UP, DOWN], "use_rslora": True}, 4),
        }
        for what, (more, modules) in cases.items():
            with self.subTest(what):
                found = self.assert_read_as_peft_reads_it(written(base, lora(targets=(), **more)), base, modules)
                self.assertTrue(all(f.is_experts for f in found.values()))
        mixed = written(base, lora(targets=("q_proj",), target_parameters=[DOWN]))
        self.assert_read_as_peft_reads_it(mixed, base, 2 + 2)

    def test_per_expert_adapter_that_we_export(self) -> None:
        base = base_of(MINIMAX)
        for targets, parameters in ((("q_proj",), [GATE_UP, DOWN]), ((), [GATE_UP, DOWN])):
            source = written(base, lora(3, 5, targets, target_parameters=parameters))
            factors, directory = adapter_files.load(source, base), temporary_directory() / "exported"
            adapter_files.save_per_expert(directory, factors, base)
            names = set(load_file(directory / WEIGHTS))
            self.assertIn("base_model.model.model.layers.1.block_sparse_moe.experts.3.w2.lora_B.weight", names)
            found = self.assert_read_as_peft_reads_it(directory, base, len(factors))
            for name, f in factors.items():
                self.assertLess(relative(delta(found[name]), delta(f)), ROUNDING)

    def test_per_expert_adapter_with_factors_of_their_own_for_each_matrix(self) -> None:
        base = base_of(MINIMAX)
        for leaves in (("w1", "w2", "w3"), ("w2",)):
            with self.subTest(leaves):
                directory = per_expert(base, leaves)
                found = self.assert_read_as_peft_reads_it(directory, base, 2 * (1 if len(leaves) == 1 else 2))
                # w1 and w3 are rows of one parameter: together they have both ranks
                ranks = {name.rpartition(".")[2]: f.rank for name, f in found.items()}
                self.assertEqual(ranks, {"down_proj": 3} | ({"gate_up_proj": 6} if len(leaves) > 1 else {}))

    def test_per_expert_rslora_adapter_keeps_the_scale_it_was_trained_with(self) -> None:
        base = base_of(MINIMAX)
        directory = changed(per_expert(base, ("w1", "w2", "w3")), {"use_rslora": True})
        for f in adapter_files.load(directory, base).values():
            self.assertAlmostEqual(f.scale, 5 / 3**0.5)
        # PEFT doubles rank and alpha where it joins w1 and w3, which keeps alpha / r but not alpha / sqrt(r)
        model = PeftModel.from_pretrained(fresh(base), str(directory))
        scales = {
            name.rpartition(".")[2]: layer.scaling["default"]
            for name, layer in peft_model.lora_layers(model, "default").items()
        }
        self.assertAlmostEqual(scales["down_proj"], 5 / 3**0.5)
        self.assertAlmostEqual(scales["gate_up_proj"], 2**0.5 * 5 / 3**0.5, msg="PEFT no longer has this defect")

    def test_adapters_in_other_number_formats_are_read_as_they_are(self) -> None:
        base = base_of(LLAMA)
        for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):

            def to_dtype(state: State, dtype: torch.dtype = dtype) -> None:
                for name in state:
                    state[name] = state[name].to(dtype)

            with self.subTest(dtype):
                self.assert_read_as_peft_reads_it(changed(written(base, lora()), tensors=to_dtype), base, 4)

    def test_trl_adapter(self) -> None:
        try:
            from trl import SFTConfig, SFTTrainer
        except ImportError:
            self.skipTest("trl is not installed: pip install trl")
        from datasets import Dataset
        from transformers import PrinterCallback

        base, root = base_of(LLAMA), temporary_directory() / "trl"
        arguments = SFTConfig(
            output_dir=str(root),
            max_steps=1,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            max_length=24,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_steps=1,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        with logger.quiet_transformers():
            trainer = SFTTrainer(
                model=fresh(base),
                args=arguments,
                train_dataset=Dataset.from_dict({"input_ids": IDS.tolist()}),
                processing_class=chat.load_tokenizer(base.directory),
                peft_config=lora(),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.save_model()
        found = adapter_files.load(foreign(base, root).adapter, base)
        self.assertEqual(len(found), 4)
        self.assertLess(relative(by_hand(base, found), logits(trainer.model)), ROUNDING)


class Refused(Refusals):
    """Each case changes a copy of one good adapter that stock PEFT wrote."""

    def load(self, source: Path, base: BaseModel, **change: Any) -> Factors:
        return adapter_files.load(changed(source, **change), base)

    def setUp(self) -> None:
        self.base = base_of(LLAMA)
        self.good = good_adapter(LLAMA)

    def test_the_adapter_that_is_damaged_below_is_good(self) -> None:
        self.assertEqual(len(self.load(self.good, self.base)), 4)

    def test_missing_layer_module_or_half_of_a_pair(self) -> None:
        for part in ("layers.1.", "layers.1.self_attn.v_proj."):
            with self.subTest(part), self.refused("no factors for model.layers.1.self_attn.v_proj"):
                self.load(self.good, self.base, tensors=without(part))
        with self.refused("model.layers.0.self_attn.q_proj has A or B but not both"):
            self.load(self.good, self.base, tensors=without("layers.0.self_attn.q_proj.lora_A"))

    def test_missing_layer_whatever_way_the_targets_are_named(self) -> None:
        for what, config in {
            "regular expression": lora(targets=r".*self_attn\.(q|v)_proj"),
            "layers": lora(layers_to_transform=[0, 1]),
            "exclusions": lora(exclude_modules=["layers.0.self_attn.q_proj"]),
        }.items():
            with self.subTest(what), self.refused("no factors for model.layers.1.self_attn.v_proj"):
                self.load(written(self.base, config), self.base, tensors=without("layers.1."))

    def test_missing_experts(self) -> None:
        base = base_of(MINIMAX)
        fused = written(base, lora(targets=(), target_parameters=[GATE_UP, DOWN]))
        with self.refused("no factors for model.layers.1.mlp.experts.down_proj"):
            self.load(fused, base, tensors=without("layers.1."))
        with self.refused("layers.1.mlp.experts: 1 fused parameters have factors, target_parameters names 2"):
            self.load(fused, base, tensors=without("layers.1.mlp.experts.base_layer"))
        single = per_expert(base, ("w1", "w2", "w3"))
        for part in (
            "layers.1.block_sparse_moe.experts.3.",
            "experts.0.",
            ".w3.",
            "layers.0.block_sparse_moe.experts.1.w1",
        ):
            with self.subTest(part), self.refused("layers.", ".mlp.experts."):
                self.load(single, base, tensors=without(part))
        for part, missing in (("layers.1.", "gate_up_proj"), ("layers.1.", "down_proj"), (".w2.", "down_proj")):
            with (
                self.subTest(part, missing=missing),
                self.refused(f"no factors for model.layers.1.mlp.experts.{missing}"),
            ):
                self.load(single, base, tensors=without(part))

    def test_tensors_that_are_no_pair_of_factors(self) -> None:
        for name in ("lm_head.weight", "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"):
            with self.subTest(name), self.refused("unknown tensor", name):
                self.load(self.good, self.base, tensors=lambda state, n=name: state.update({n: torch.ones(4)}))

    def test_factors_for_a_module_that_the_settings_do_not_name(self) -> None:
        directory = changed(self.good, tensors=with_extra_module)
        ignored = logits(PeftModel.from_pretrained(fresh(self.base), str(directory)))
        good = logits(PeftModel.from_pretrained(fresh(self.base), str(self.good)))
        self.assertTrue(torch.equal(ignored, good), "PEFT does not ignore them any more")
        with self.refused("model.layers.0.self_attn.o_proj"):
            adapter_files.load(directory, self.base)

    def test_wrong_shapes(self) -> None:
        def narrower(state: State) -> None:
            for name in [n for n in state if "lora_A" in n]:
                state[name] = state[name][:, :-1].contiguous()

        with self.refused("model.layers.0.self_attn.q_proj updates (64, 63), the base model's is (64, 64)"):
            self.load(self.good, self.base, tensors=narrower)
        deeper = changed(
            self.good, tensors=lambda s: s.update({n.replace("s.1.", "s.7."): s[n].clone() for n in list(s)})
        )
        with self.refused("the base model has no model.layers.7.self_attn.q_proj"):
            adapter_files.load(deeper, self.base)
        with self.refused("model.layers.0.self_attn.q_proj has rank 4", "its config says 3"):
            self.load(self.good, self.base, settings={"r": 3})

    def test_zero_not_finite_and_damaged_weights(self) -> None:
        with self.refused("every B", "is zero"):
            self.load(self.good, self.base, tensors=with_zero_b)
        with self.refused("is zero"):  # alpha 0 is the same nothing in other words
            self.load(self.good, self.base, settings={"lora_alpha": 0})
        with self.refused("holds NaN or infinity"):
            self.load(self.good, self.base, tensors=with_nan)
        directory = changed(self.good)
        content = (directory / WEIGHTS).read_bytes()
        (directory / WEIGHTS).write_bytes(content[:-100])
        with self.refused(f"{directory / WEIGHTS} is damaged", "restore it from a copy"):
            adapter_files.load(directory, self.base)

    def test_settings_that_are_more_than_scale_times_b_times_a(self) -> None:
        reasons: dict[str, dict[str, Any]] = {
            "bias is trained too": {"bias": "all"},
            "bias is trained too: it is not part of the update (got 'lora_only')": {"bias": "lora_only"},
            "trainable_token_indices is set: changed embedding rows": {"trainable_token_indices": [1, 2]},
            "use_dora is set": {"use_dora": True},
            "alora_invocation_tokens is set: its effect on the update is not known here": {
                "alora_invocation_tokens": [5]
            },
            "future_variant is set: its effect on the update is not known here (got True)": {"future_variant": True},
            "peft_type is not LORA (got 'LOHA')": {"peft_type": "LOHA"},
            "auto_mapping is set": {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
        }
        for reason, settings in reasons.items():
            with self.subTest(reason), self.refused(reason):
                self.load(self.good, self.base, settings=settings)
        with self.refused("2 problems", "bias is trained too", "use_dora is set"):
            self.load(self.good, self.base, settings={"bias": "all", "use_dora": True})
        # switched off, such settings mean nothing
        off = {"future_variant": False, "modules_to_save": [], "use_dora": False, "trainable_token_indices": None}
        self.assertEqual(len(self.load(self.good, self.base, settings=off)), 4)

    def test_what_stock_peft_writes_for_such_adapters_is_refused_too(self) -> None:
        for reason, config in {
            "bias is trained too": lora(bias="all"),
            "trainable_token_indices is set": lora(trainable_token_indices=[1, 2]),
            "use_dora is set": lora(use_dora=True),
            "adapts embeddings": lora(targets=("embed_tokens", "q_proj")),
        }.items():
            with self.subTest(reason), self.refused(reason):
                adapter_files.load(written(self.base, config), self.base)

    def test_settings_that_cannot_be_read_are_sentences_and_not_tracebacks(self) -> None:
        for settings in (
            {"r": "4"},
            {"r": 0},
            {"lora_alpha": None},
            {"lora_alpha": float("nan")},
            {"rank_pattern": [1]},
            {"rank_pattern": {"q_proj": "four"}},
            {"rank_pattern": {"q_proj": 0}},
            {"rank_pattern": {"(": 4}},
            {"alpha_pattern": {"q_proj": "x"}},
            {"target_modules": "(("},
            {"target_modules": "(" * 9000 + ")" * 9000},
            {"target_modules": {"q_proj": True}},
            {"layers_to_transform": "all"},
            {"rank_pattern": {"q{99999999999999999999}": 4}},
            {"lora_alpha": 10**400},
            {"r": True},
            {"megatron_core": "os"},
            {"base_model_name_or_path": 3},
            {"task_type": ["CAUSAL_LM"]},
            {"init_lora_weights": "a_future_one"},
        ):
            with self.subTest(settings), self.refused(next(iter(settings))):
                self.load(self.good, self.base, settings=settings)


class Bases(Refusals):
    """Whether an adapter was made for this base model: by digest where that can be known, else with a warning."""

    def test_adapter_made_on_a_directory_with_the_same_weights_is_accepted_wherever_that_is(self) -> None:
        here = base_of(LLAMA)
        moved = temporary_directory() / "elsewhere"
        shutil.copytree(here.directory, moved)
        for directory in (here.directory, moved):
            source = changed(good_adapter(LLAMA), {"base_model_name_or_path": str(directory)})
            with self.assertLogs("adapters", "INFO") as logged:
                run = foreign(here, source)
            self.assertNotIn("cannot be verified", " ".join(logged.output))
            self.assertEqual((run.adapter, run.manifest["base"]["digest"]), (source, here.digest))
            self.assertEqual(run.manifest["files"][WEIGHTS], files.sha256_file(source / WEIGHTS))

    def test_adapter_made_on_a_directory_with_other_weights_is_refused(self) -> None:
        other = written(base_of(LLAMA, seed=1), lora())
        self.assertEqual(len(adapter_files.load(other, base_of(LLAMA))), 4, "its shapes fit: only the digest can tell")
        named = str(base_of(LLAMA, seed=1).directory)
        with self.refused(
            "was made for another base model",
            f"this one is {base_of(LLAMA).source}; to use it, repeat your command with --base.source {named}",
        ):
            foreign(base_of(LLAMA), other)

    def test_hub_id_on_a_local_base_cannot_be_verified_and_is_warned_about(self) -> None:
        # a directory that is not a model any more says as little as one that is gone
        for named in ("org/model", str(temporary_directory()), "/no/such/place", None):
            source = changed(good_adapter(LLAMA), {"base_model_name_or_path": named})
            with self.assertLogs("adapters", "WARNING") as logged:
                run = foreign(base_of(LLAMA), source)
            self.assertIn("cannot be verified", logged.output[0])
            self.assertEqual(logged.records[0].facts["made_for"], named or "not said")
            self.assertEqual(run.manifest["identity"]["on"], parent_runs.EXTERNAL)

    def test_hub_id_on_a_base_from_the_hub_has_to_be_that_one_at_that_commit(self) -> None:
        base = replace(base_of(LLAMA), source="org/model", revision="a" * 40)
        ours = f"this one is org/model {'a' * 40}; to use it, repeat your command with --base."
        for named, revision, way in (
            ("org/other", None, "source org/other"),
            ("org/model", "b" * 40, f"revision {'b' * 40}; if it is the same in other files, say --inputs.same_base"),
            (
                "org/model",
                "v1",
                "revision COMMIT, which this prints: git ls-remote https://huggingface.co/org/model v1;",
            ),
        ):
            settings = {"base_model_name_or_path": named, "revision": revision}
            with self.subTest(settings), self.refused("was made for another base model", named, ours + way):
                foreign(base, changed(good_adapter(LLAMA), settings))
        for revision in (None, "main", "a" * 40):
            settings = {"base_model_name_or_path": "org/model", "revision": revision}
            foreign(base, changed(good_adapter(LLAMA), settings))

    def test_changed_weights_or_settings_are_another_adapter(self) -> None:
        def halved(state: State) -> None:
            for name in state:
                state[name] = state[name] * 0.5

        good = good_adapter(LLAMA)
        digests = {
            foreign(base_of(LLAMA), path).digest
            for path in (good, changed(good), changed(good, {"lora_alpha": 9}), changed(good, tensors=halved))
        }
        self.assertEqual(len(digests), 3, "a copy is the same, each change is another")


class Scripts(unittest.TestCase):
    """`compose.py` and `inference.py` on folders that stock PEFT wrote, as a person would run them."""

    place: Workspace
    base: BaseModel
    domain: Path
    task: Path

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Workspace()
        section = BaseModelSection(source="toy:minimax_m2", name="tiny-minimax-m2", dtype="float32")
        cls.base = sources.fetch(section, cls.place.models)
        cls.domain = written(cls.base, lora(), cls.place.root / "from_peft")
        task = lora(3, 5, ("q_proj", "o_proj"), use_rslora=True, target_parameters=[DOWN])
        cls.task = cls.place.root / "named"
        made_by_peft(cls.base, task, "legal", seed=1).save_pretrained(cls.task)

    def test_two_peft_folders_are_composed_and_answer(self) -> None:
        flags = ["--domain_adapter", str(self.domain), "--task_adapter", str(self.task)]
        found = last_json(self.place.run("compose", *flags, "--weights", "1,0.5", "--run.name", "two"))
        self.assertEqual(found["adapters"], [str(self.domain), str(self.task / "legal")])
        self.assertEqual((found["method"], found["weights"], found["exact"]), ("sum", [1.0, 0.5], True))
        self.assertLess(found["relative_error"], ROUNDING)
        self.assertEqual(Path(found["composed"]), self.place.models / "composed" / "two")
        manifest = files.verify(Path(found["composed"]))
        self.assertEqual([parent["path"] for parent in manifest["parents"]], found["adapters"])
        # one ordinary PEFT adapter, which stock PEFT loads: the logits of the base with both updates added by hand
        parts = [adapter_files.load(path, self.base) for path in (self.domain, self.task / "legal")]
        expected = by_hand(self.base, parts[0], compose(parts[1:], Recipe(weights=(0.5,))))
        plain = PeftModel.from_pretrained(fresh(self.base), found["adapter"])
        self.assertGreater(relative(expected, by_hand(self.base, parts[1])), AN_EFFECT)
        self.assertLess(relative(logits(plain), expected), ROUNDING)
        answered = self.place.run("inference", *flags, "--prompt", "x")
        self.assertEqual(set(last_json(answered)), {"prompt", "answer", "reasoning", "adapters"})
        self.assertEqual(last_json(answered)["adapters"], found["adapters"])
        self.assertIn("using the newest composed run of these adapters", answered.stderr)

    def test_wrong_inputs_end_with_a_sentence_and_leave_nothing_behind(self) -> None:
        own = own_run(self.place.models / "domain" / "own", "domain", self.base)
        twice = own_run(self.place.models / "domain" / "tampered", "domain", self.base)
        with (own.adapter / WEIGHTS).open("r+b") as handle:
            handle.seek(-5, 2)
            byte = handle.read(1)
            handle.seek(-5, 2)
            handle.write(bytes([byte[0] ^ 1]))
        settings = files.read_json(twice.adapter / CONFIG)
        files.write_json(twice.adapter / CONFIG, {**settings, "lora_alpha": settings["lora_alpha"] + 1})
        truncated = changed(self.domain)
        (truncated / WEIGHTS).write_bytes((truncated / WEIGHTS).read_bytes()[:-64])
        inside = changed(self.domain)
        elsewhere = written(saved_model("minimax_m2", seed=1), lora())
        (empty := self.place.root / "empty").mkdir()
        cases: dict[str, tuple[Path, list[str], tuple[str, ...]]] = {
            "the same folder twice": (self.task, [], ("the same adapter is given twice", str(self.task))),
            "the same adapter in a copy": (changed(self.task / "legal"), [], ("the same adapter is given twice",)),
            "too few weights": (
                self.domain,
                ["--weights", "1"],
                ("sum of 2 adapters takes 2 weights, got 1; one number for each", "task: --weights 1,1"),
            ),
            "too many weights": (
                self.domain,
                ["--weights", "1,1,1"],
                ("compose.weights has 3 numbers", "takes 2", "--weights 1,1"),
            ),
            "too few weights per layer": (
                self.domain,
                ["--compose.method", "per_layer", "--weights", "1,1,1"],
                ("per_layer of 2 adapters takes 4 weights, got 3",),
            ),
            "output inside the input": (
                inside,
                ["--run.models_dir", str(inside)],
                (f"the output lies inside its input {inside}", "choose another"),
            ),
            "truncated file": (truncated, [], (f"{truncated / WEIGHTS} is damaged",)),
            "flipped bit in a run of ours": (
                own.directory,
                [],
                (f"{own.adapter / WEIGHTS} was changed after it was written",),
            ),
            "tampered settings in a run of ours": (
                twice.directory,
                [],
                (str(twice.adapter / CONFIG), "its manifest says" if settings["lora_alpha"] == 9 else "was changed"),
            ),
            "zero": (changed(self.domain, tensors=with_zero_b), [], ("every B", "is zero")),
            "NaN": (changed(self.domain, tensors=with_nan), [], ("holds NaN or infinity",)),
            "missing keys": (
                changed(self.domain, tensors=without("layers.1.")),
                [],
                ("no factors for model.layers.1",),
            ),
            "extra keys": (changed(self.domain, tensors=with_extra_module), [], ("model.layers.0.self_attn.o_proj",)),
            "another base": (elsewhere, [], (f"{elsewhere} was made for another base model",)),
            "nothing there": (self.place.root / "nothing", [], ("no adapter in PEFT's format", "no such directory")),
            "an empty folder": (empty, [], ("looked for adapter_config.json",)),
        }
        kept = sorted(p for p in (self.place.models / "composed").rglob("*"))
        running = {
            what: self.place.start("compose", "--domain_adapter", str(path), "--task_adapter", str(self.task), *more)
            for what, (path, more, _) in cases.items()
        }
        for what, (_, _, parts) in cases.items():
            with self.subTest(what):
                self.assert_refused(running[what].wait(), *parts)
        self.assertEqual(sorted(p for p in (self.place.models / "composed").rglob("*")), kept)
        self.assertEqual({p.name for p in inside.iterdir()}, {p.name for p in self.domain.iterdir()})

    def assert_refused(self, completed: Completed[str], *parts: str) -> None:
        self.assertEqual(completed.returncode, 2, completed.stderr[-2000:])
        self.assertNotIn("Traceback", completed.stderr)
        self.assertEqual(completed.stdout.strip(), "")
        for part in parts:
            self.assertIn(part, completed.stderr)


def own_run(directory: Path, kind: str, base: BaseModel) -> Run:
    """A complete run of ours, sealed as training seals it."""
    factors = adapter_files.load(good_adapter(MINIMAX if base.model_type == MINIMAX else LLAMA))
    adapter_files.save(directory / "adapter", factors, base)
    identity = Identity({"stage": kind, "base": base.digest, "name": directory.name})
    manifest = runs.manifest(kind, identity, base=base.record(), parents=[], measured={}, system_prompt="")
    return Run(directory, files.seal(directory, manifest))


@functools.cache
def good_adapter(architecture: str) -> Path:
    return written(base_of(architecture), lora())


def per_expert(base: BaseModel, leaves: tuple[str, ...], rank: int = 3) -> Path:
    """An adapter as PEFT wrote it before experts were fused: random factors of its own for every matrix."""
    generator, state = torch.Generator().manual_seed(4), {}
    for name, shape in checkpoint_shapes(base).items():
        if name.rpartition(".")[2] in leaves:
            key = f"base_model.model.{name}"
            state[f"{key}.lora_A.weight"] = 0.2 * torch.randn(rank, shape[1], generator=generator)
            state[f"{key}.lora_B.weight"] = 0.2 * torch.randn(shape[0], rank, generator=generator)
    directory = temporary_directory() / "per_expert"
    lora(rank, 5, leaves, base_model_name_or_path=str(base.directory)).save_pretrained(directory)
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def checkpoint_shapes(base: BaseModel) -> dict[str, tuple[int, ...]]:
    state = load_file(base.directory / "model.safetensors")
    return {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in state.items() if ".experts." in name}


if __name__ == "__main__":
    unittest.main()
