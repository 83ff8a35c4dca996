"""Merging shard by shard: the written model is base + adapter to the last rounding, or it is not published."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from config import ATTENTION, BaseModelSection, MergeSection
from tests import support, test_architecture
from tests.support import ARCHITECTURES, random_factors, relative, temporary_directory
from utils import logger
from utils.adapters import peft_model
from utils.adapters.factors import Factors, ModuleFactors, delta
from utils.artifacts import resumable
from utils.exceptions import ArtefactError, NonFiniteError, VerificationError
from utils.export import merge, merge_check, merge_plan, merged_logits, merged_shards, merged_tensors
from utils.models import loading, older_spellings
from utils.models.base_model import BaseModel
from utils.models.weights import companion_files, fp8, layer_sample, safetensors_io

SECTION = BaseModelSection(dtype="float32")
ROUTERS = ("block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias")
FP8_SETTINGS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "float8_e4m3fn",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}
IDS = torch.randint(0, 700, (2, 24), generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------------ bases and adapters


@functools.cache
def checkpoint(architecture: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> BaseModel:
    """A toy in several files, routers in float32, as MiniMax-M2 ships."""
    directory = temporary_directory() / "base"
    model, tokenizer = ARCHITECTURES[architecture](layers=layers)
    with logger.quiet_transformers():
        model.to(dtype).save_pretrained(directory, max_shard_size="150KB")
        tokenizer.save_pretrained(directory)
    for path in directory.glob("*.safetensors"):
        state = load_file(path)
        routers = {n: t.float() for n, t in state.items() if n.endswith(ROUTERS)}
        save_file(state | routers, path, metadata={"format": "pt"})
    assert len(list(directory.glob("*.safetensors"))) > 2
    return identified(directory)


@functools.cache
def fp8_checkpoint(hidden: int = 128, intermediate: int = 128) -> BaseModel:
    """A tiny MiniMax-M2 whose linear weights are FP8; block scales are in another file than their weights."""
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    settings = MiniMaxM2Config(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        rotary_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    directory = temporary_directory() / "fp8"
    with logger.quiet_transformers():
        model = MiniMaxM2ForCausalLM(settings)
        for name, parameter in model.named_parameters():
            parameter.data.mul_(3.0 if parameter.ndim > 1 and "embed" not in name else 1.0)
        model.save_pretrained(directory)
    weights, scales = {}, {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if "proj" in name or ".experts." in name:
            weights[name], scales[f"{name}_scale_inv"] = quantised_by_hand(tensor, top=300.0)  # unlike ours
        else:
            weights[name] = tensor if name.endswith(ROUTERS) else tensor.bfloat16()
    (directory / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": weights, "model-00002-of-00002.safetensors": scales}
    for file, state in parts.items():
        save_file(state, directory / file, metadata={"format": "pt"})
    where = {name: file for file, state in parts.items() for name in state}
    (directory / merge.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    described = json.loads((directory / "config.json").read_text())
    described |= {"quantization_config": FP8_SETTINGS, "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(described))
    return identified(directory)


def quantised_by_hand(weights: torch.Tensor, top: float = 448.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block, written out."""
    codes = torch.empty(weights.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weights.shape[0] // 128), -(-weights.shape[1] // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weights[here].abs().max() / top or 1.0
            codes[here] = (weights[here] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def dequantised_by_hand(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.float8_e4m3fn:
            blocks = state[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            found[name] = tensor.float() * blocks[: tensor.shape[0], : tensor.shape[1]]
        elif not name.endswith("_scale_inv"):
            found[name] = tensor.float()
    return found


def identified(directory: Path) -> BaseModel:
    return BaseModel(directory, str(directory), "", "0" * 64, "0" * 64)


def skeleton(base: BaseModel) -> torch.nn.Module:
    """The model's modules and shapes."""
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(base.directory)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings)


def on_attention(base: BaseModel, size: float = 0.1) -> dict[str, ModuleFactors]:
    return random_factors(skeleton(base), ATTENTION, 3, 6.0, seed=1, size=size)


def on_experts(base: BaseModel, size: float = 0.1) -> dict[str, ModuleFactors]:
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name, parameter in skeleton(base).named_parameters():
        if parameter.ndim == 3:
            experts, rows, columns = parameter.shape
            a_ErI = torch.randn(experts, 2, columns, generator=generator) * size
            b_EOr = torch.randn(experts, rows, 2, generator=generator) * size
            found[name] = ModuleFactors(a_ErI, b_EOr, 1.5)
    return found


def delta_by_hand(factors: Factors, name: str) -> torch.Tensor | None:
    """The update of a tensor under its name on disk, the renaming of MiniMax-M2 written out."""
    module = name.removesuffix(".weight").replace("block_sparse_moe", "mlp")
    head, _, tail = module.partition(".experts.")
    if not tail:
        return delta(factors[module]) if module in factors else None
    expert, _, leaf = tail.partition(".")
    fused = f"{head}.experts.{'down_proj' if leaf == 'w2' else 'gate_up_proj'}"
    if fused not in factors:
        return None
    whole = delta(factors[fused])[int(expert)]
    half = whole.shape[0] // 2
    return {"w1": whole[:half], "w3": whole[half:], "w2": whole}[leaf]


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


# --------------------------------------------------------------------------------------------------------- one merge


def merged(
    base: BaseModel, factors: Factors, target: Path | None = None, dtype: str = "base", *, checked: bool = False
) -> tuple[Path, dict[str, Any]]:
    """A merge, by default without its self-check, which takes seconds and has its own tests."""
    target = target or temporary_directory() / "merged"
    unchecked = mock.patch.object(merge_check, "merged_equals_composed", return_value={})
    with contextlib.nullcontext() if checked else unchecked:
        checks = merge.merge(
            base,
            factors,
            target,
            MergeSection(dtype=dtype),
            SECTION,
            fingerprint="f" * 64,
            manifest=lambda checks: {"kind": "merged", "measured": checks},
            card="# A merged model\n",
        )
    return target, checks


def partial(target: Path) -> Path:
    """Where an interrupted merge keeps what it has."""
    return target.with_name(f".{target.name}.partial-{'f' * 12}")


def reloaded_here(directory: Path, ids_BT: torch.Tensor, scratch: Path) -> torch.Tensor:
    """What the fresh process computes, without the seconds that starting one takes."""
    model = loading.load_model(identified(directory), SECTION, dtype=torch.float32).float()
    for module in model.modules():
        if hasattr(module, "top_k") and hasattr(module, "num_experts"):
            module.top_k = module.num_experts
    with torch.no_grad():
        return model(ids_BT, use_cache=False).logits


def checked_here(base: BaseModel, factors: Factors, directory: Path, available: int | None = None) -> dict[str, Any]:
    with mock.patch.object(merge_check, "_reloaded", reloaded_here):
        return merge_check.merged_equals_composed(base, factors, directory, SECTION, available_bytes=available)


class Written(unittest.TestCase):
    def test_every_tensor_is_base_plus_delta_and_the_others_are_the_base(self) -> None:
        m2 = checkpoint("minimax_m2")
        cases = {
            "llama": (checkpoint("llama"), on_attention(checkpoint("llama"))),
            "attention": (m2, on_attention(m2)),
            "experts": (m2, on_experts(m2)),
            "mixed": (m2, on_attention(m2) | on_experts(m2)),
            "one layer": (m2, {n: f for n, f in on_experts(m2).items() if ".1." in n}),
        }
        for case, (base, factors) in cases.items():
            before, (target, checks) = state_of(base.directory), merged(base, factors)
            after = state_of(target)
            with self.subTest(case):
                self.assertEqual(after.keys(), before.keys())
                changed = {name: change for name in before if (change := delta_by_hand(factors, name)) is not None}
                self.assertEqual(checks["tensors_changed"], len(changed))
                self.assertEqual(checks["tensors"], len(before))
                for name, tensor in after.items():
                    if name in changed:
                        self.assertLess(relative(tensor - before[name], changed[name]), 1e-5, name)
                    else:
                        self.assertTrue(torch.equal(tensor, before[name]), name)

    def test_files_names_order_and_companions_are_the_bases(self) -> None:
        base = checkpoint("minimax_m2", torch.bfloat16)
        target, _ = merged(base, on_attention(base))
        for path in base.directory.iterdir():
            written = target / path.name
            self.assertTrue(written.is_file(), path.name)
            if path.suffix == ".safetensors":
                self.assertEqual(safetensors_io.read_header(written), safetensors_io.read_header(path))
            elif path.name == merge.INDEX:
                index, total = json.loads(written.read_text()), sum(t.nbytes for t in state_of(target).values())
                self.assertEqual(index["metadata"], {"total_size": total})
                self.assertEqual(index["weight_map"], json.loads(path.read_text())["weight_map"])
            elif path.name == "config.json":
                self.assertEqual(
                    json.loads(written.read_text()), older_spellings.of_config(json.loads(path.read_text()))
                )
            else:
                content = older_spellings.identified(written) or written.read_bytes()
                self.assertEqual(content, path.read_bytes(), path.name)
        names = {path.name for path in target.iterdir()} - {path.name for path in base.directory.iterdir()}
        self.assertEqual(names, {"README.md", "manifest.json"})
        self.assertEqual((target / "README.md").read_text(), "# A merged model\n")

    def test_a_file_that_nothing_changes_is_copied_byte_for_byte(self) -> None:
        base = checkpoint("llama")
        target, _ = merged(base, {n: f for n, f in on_attention(base).items() if "layers.1" in n})
        same = [
            p.name for p in base.directory.glob("*.safetensors") if p.read_bytes() == (target / p.name).read_bytes()
        ]
        changed = [p.name for p in base.directory.glob("*.safetensors") if p.name not in same]
        self.assertTrue(same)
        self.assertTrue(changed)

    def test_the_manifest_holds_the_sha256_of_every_file(self) -> None:
        from utils.artifacts import files

        base = checkpoint("llama")
        target, checks = merged(base, on_attention(base))
        self.assertEqual(files.verify(target, hash_files=True)["measured"], checks)

    def test_each_dtype_is_rounded_once_and_routers_keep_float32(self) -> None:
        base = checkpoint("minimax_m2", torch.bfloat16)
        factors, before = on_attention(base) | on_experts(base), state_of(base.directory)
        for choice, dtype in (("base", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            target, checks = merged(base, factors, dtype=choice)
            with self.subTest(choice):
                for name, tensor in state_of(target).items():
                    expected = torch.float32 if name.endswith(ROUTERS) else dtype
                    self.assertEqual(tensor.dtype, expected, name)
                    change = delta_by_hand(factors, name)
                    exact = before[name].float() + (0 if change is None else change)
                    if expected == torch.float32:
                        self.assertLess(relative(tensor, exact), 1e-6, name)
                        continue
                    # float32 sums may fall on two sides of a rounding border; rounding twice would show in 1 of 500
                    self.assertLess(float((tensor != exact.bfloat16()).float().mean()), 5e-4, name)
                written = json.loads((target / "config.json").read_text())
                self.assertEqual(written["dtype"], str(dtype).removeprefix("torch."))
                self.assertEqual(checks["rounding_to_weight"] > 0, dtype == torch.bfloat16)

    def test_rounding_is_measured_against_the_weight_and_the_delta(self) -> None:
        base = checkpoint("llama", torch.bfloat16)
        factors, before = on_attention(base, size=0.02), state_of(base.directory)
        target, checks = merged(base, factors)
        errors, exacts, deltas = [], [], []
        for name, tensor in state_of(target).items():
            if (change := delta_by_hand(factors, name)) is not None:
                exact = before[name].double() + change.double()
                errors.append(float((tensor.double() - exact).norm()))
                exacts.append(float(exact.norm()))
                deltas.append(float(change.norm()))
        self.assertAlmostEqual(checks["rounding_to_weight"] / (math.hypot(*errors) / math.hypot(*exacts)), 1, places=3)
        self.assertAlmostEqual(checks["rounding_to_delta"] / (math.hypot(*errors) / math.hypot(*deltas)), 1, places=3)
        worst = max(e / d for e, d in zip(errors, deltas, strict=True))
        self.assertAlmostEqual(checks["rounding_to_delta_worst"] / worst, 1, places=3)
        self.assertGreater(checks["rounding_to_delta"], 0.02)
        self.assertLess(checks["rounding_to_weight"], 0.003)

    def test_tensors_of_several_pieces_and_fused_experts_on_disk_are_merged_too(self) -> None:
        generator = torch.Generator().manual_seed(4)
        names = {
            "model.layers.0.self_attn.q_proj.weight": (300, 20),
            "model.layers.0.mlp.experts.down_proj": (3, 260, 8),
        }
        before = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
        factors = {
            name.removesuffix(".weight"): ModuleFactors(
                torch.randn(*lead, 2, columns, generator=generator),
                torch.randn(*lead, rows, 2, generator=generator),
                0.5,
            )
            for name, (*lead, rows, columns) in names.items()
        }
        directory = temporary_directory()
        (directory / "config.json").write_text(json.dumps({"model_type": "minimax_m2", "num_hidden_layers": 1}))
        save_file(before, directory / "model.safetensors", metadata={"format": "pt"})
        with mock.patch.object(safetensors_io, "PIECE_BYTES", 1):
            target, _ = merged(identified(directory), factors)
        for name, tensor in state_of(target).items():
            change = delta(factors[name.removesuffix(".weight")])
            self.assertLess(relative(tensor - before[name], change), 1e-5, name)

    def test_a_hub_cache_of_symlinks_is_read_and_not_touched(self) -> None:
        base, cache = checkpoint("llama"), temporary_directory()
        for path in base.directory.iterdir():
            (cache / path.name).symlink_to(path)
        cache.chmod(0o555)
        before = sorted(path.name for path in cache.iterdir())
        target, _ = merged(identified(cache), on_attention(base))
        self.assertEqual(sorted(path.name for path in cache.iterdir()), before)
        self.assertFalse(any(path.is_symlink() for path in target.iterdir()))

    def test_a_file_that_transformers_would_not_read_is_left_out(self) -> None:
        base, directory = checkpoint("llama"), temporary_directory() / "extra"
        shutil.copytree(base.directory, directory)
        name = "model.layers.0.self_attn.q_proj.weight"
        save_file({name: torch.ones(3)}, directory / "consolidated.safetensors", metadata={"format": "pt"})
        target, _ = merged(identified(directory), on_attention(base))
        self.assertFalse((target / "consolidated.safetensors").exists())
        self.assertEqual(state_of(target)[name].ndim, 2)


class Fp8(unittest.TestCase):
    def test_quantising_gives_the_values_and_scales_written_out_by_hand(self) -> None:
        torch.manual_seed(0)
        for shape in ((128, 256), (200, 130), (1, 1), (127, 129)):
            weights = torch.randn(shape)
            weights[:100, :128] = 0.0
            codes, scales = fp8.quantise(weights, (128, 128))
            expected_codes, expected_scales = quantised_by_hand(weights)
            with self.subTest(shape):
                self.assertTrue(torch.equal(codes.float(), expected_codes.float()))
                self.assertTrue(torch.equal(scales, expected_scales))
                found = fp8.dequantise(codes, scales, (128, 128))
                expected = dequantised_by_hand({"w": codes, "w_scale_inv": scales})["w"]
                self.assertTrue(torch.equal(found, expected))
                # half of the last of 4 significant bits, or of the smallest step of a block
                limit = torch.maximum(weights.abs() / 16, torch.full_like(weights, float(scales.max()) * 2**-10))
                self.assertTrue(((found - weights).abs() <= limit * 1.001).all())

    def test_zero_blocks_have_scale_1_and_experts_are_quantised_one_by_one(self) -> None:
        weights = torch.randn(3, 130, 64)
        weights[1] = 0.0
        codes, scales = fp8.quantise(weights, (128, 128))
        self.assertEqual(scales.shape, fp8.block_grid(weights.shape, (128, 128)))
        self.assertEqual(scales[1].flatten().tolist(), [1.0, 1.0])
        self.assertTrue(torch.equal(fp8.dequantise(codes, scales, (128, 128))[1], torch.zeros(130, 64)))
        self.assertTrue(torch.equal(scales[2], fp8.quantise(weights[2], (128, 128))[1]))

    def test_to_bfloat16_is_the_dequantised_sum_rounded_once_and_leaves_no_trace_of_fp8(self) -> None:
        for hidden, intermediate in ((128, 128), (160, 96)):  # whole and partial blocks
            base = fp8_checkpoint(hidden, intermediate)
            factors = on_attention(base) | on_experts(base)
            before = dequantised_by_hand(state_of(base.directory))
            target, _ = merged(base, factors)
            after = state_of(target)
            with self.subTest(hidden=hidden):
                self.assertEqual(after.keys(), before.keys())
                for name, tensor in after.items():
                    change = delta_by_hand(factors, name)
                    exact = before[name] + (0 if change is None else change)
                    self.assertEqual(tensor.dtype, torch.float32 if name.endswith(ROUTERS) else torch.bfloat16)
                    self.assertLess(float((tensor != exact.to(tensor.dtype)).float().mean()), 5e-4, name)
                settings = json.loads((target / "config.json").read_text())
                self.assertNotIn("quantization_config", settings)
                self.assertEqual(settings["dtype"], "bfloat16")
                index = json.loads((target / merge.INDEX).read_text())
                self.assertEqual(index["weight_map"].keys(), after.keys())
                self.assertEqual(index["metadata"]["total_size"], sum(t.nbytes for t in after.values()))

    def test_to_fp8_copies_what_does_not_change_and_quantises_the_rest_anew(self) -> None:
        for hidden, intermediate in ((128, 128), (160, 96)):
            base = fp8_checkpoint(hidden, intermediate)
            factors = on_attention(base) | {n: f for n, f in on_experts(base).items() if "down" in n}
            before, (target, checks) = state_of(base.directory), merged(base, factors, dtype="fp8")
            after, plain = state_of(target), dequantised_by_hand(before)
            with self.subTest(hidden=hidden):
                self.assertEqual(after.keys(), before.keys())
                for name, tensor in after.items():
                    change = delta_by_hand(factors, name.removesuffix("_scale_inv"))
                    self.assertEqual(tensor.dtype, before[name].dtype, name)
                    if change is None:
                        self.assertEqual(safetensors_io.as_bytes(tensor), safetensors_io.as_bytes(before[name]), name)
                    elif not name.endswith("_scale_inv"):
                        codes, scales = quantised_by_hand(plain[name] + change)
                        self.assertLess(relative(after[f"{name}_scale_inv"], scales), 1e-6, name)
                        self.assertLess(float((tensor.float() != codes.float()).float().mean()), 1e-3, name)
                described = json.loads((target / "config.json").read_text())
                settings = json.loads((base.directory / "config.json").read_text())
                self.assertEqual(described, older_spellings.of_config(settings))
                self.assertLess(abs(checks["rounding_to_weight"] / 0.021 - 1), 1)

    def test_errors_are_those_known_of_minimax_m2(self) -> None:
        """0.35% from FP8 to bfloat16 beside peft's merge, which rounds twice; 2.1% from FP8 to FP8."""
        base = fp8_checkpoint()
        factors = on_attention(base, size=0.03)
        with torch.no_grad():
            model = loading.load_model(base, SECTION, dtype=torch.bfloat16)
            by_peft = peft_model.add(model, "composed", factors).merge_and_unload().state_dict()
        ours = state_of(merged(base, factors)[0])
        requantised = dequantised_by_hand(state_of(merged(base, factors, dtype="fp8")[0]))
        before = dequantised_by_hand(state_of(base.directory))
        names = [name + ".weight" for name in factors]
        exact = torch.cat([(before[n] + delta(factors[n.removesuffix(".weight")])).flatten() for n in names])

        def error(a: dict[str, torch.Tensor], b: torch.Tensor) -> float:
            return float((torch.cat([a[name].float().flatten() for name in names]) - b).norm() / exact.norm())

        peft = torch.cat([by_peft[name].float().flatten() for name in names])
        for found, known in ((error(ours, peft), 0.0035), (error(requantised, exact), 0.021)):
            self.assertGreater(found, known / 2)
            self.assertLess(found, known * 2)

    def test_fp8_is_refused_for_a_base_that_has_none(self) -> None:
        base = checkpoint("llama")
        with self.assertRaisesRegex(ArtefactError, "--merge.dtype base or bfloat16"):
            merged(base, on_attention(base), dtype="fp8")

    def test_fp8_without_block_scales_are_refused_before_anything_is_written(self) -> None:
        base, directory = fp8_checkpoint(), temporary_directory() / "base"
        shutil.copytree(base.directory, directory)
        scales = directory / "model-00002-of-00002.safetensors"
        state = load_file(scales)
        name = "model.layers.1.self_attn.k_proj.weight_scale_inv"
        for broken in ({n: t for n, t in state.items() if n != name}, state | {name: torch.ones(2, 1)}):
            save_file(broken, scales, metadata={"format": "pt"})
            (directory / merge.INDEX).unlink(missing_ok=True)
            target = temporary_directory() / "merged"
            with self.assertRaisesRegex(ArtefactError, "k_proj.weight"):
                merged(identified(directory), on_attention(base), target)
            self.assertFalse(partial(target).exists())


class Files(unittest.TestCase):
    def test_written_files_load_with_the_library_whatever_their_dtypes_and_sizes(self) -> None:
        state = {
            "codes": torch.randn(3, 5).to(torch.float8_e4m3fn),
            "odd": torch.randn(7).bfloat16(),
            "matrix": torch.randn(5, 3),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "nothing": torch.zeros(0, 4),
            "flags": torch.tensor([True, False, True]),
            'naïve "name"': torch.arange(3),
        }
        names = {dtype: name for name, dtype in safetensors_io.DTYPES.items()}
        described = {n: safetensors_io.described(names[t.dtype], tuple(t.shape)) for n, t in state.items()}
        path = temporary_directory() / "x.safetensors"
        header = safetensors_io.plan(described, {"format": "pt"})
        digest = safetensors_io.write(path, header, lambda name: [safetensors_io.as_bytes(state[name])])
        self.assertEqual(digest, hashlib.sha256(path.read_bytes()).hexdigest())
        self.assertEqual((safetensors_io.read_header(path), path.stat().st_size), (header, header.size))
        for tensor in header.tensors.values():
            self.assertEqual((header.data_start + tensor.begin) % safetensors_io.DTYPES[tensor.dtype].itemsize, 0)
        for name, tensor in load_file(path).items():
            self.assertEqual((tensor.dtype, tensor.shape), (state[name].dtype, state[name].shape))
            self.assertEqual(safetensors_io.as_bytes(tensor), safetensors_io.as_bytes(state[name]), name)

    def test_a_large_tensor_is_read_in_pieces_of_whole_blocks(self) -> None:
        directory = temporary_directory()
        (directory / "config.json").write_text("{}")
        weights = torch.randn(2, 1000, 2048)
        path = directory / "model.safetensors"
        save_file({"w": weights}, path, metadata={"format": "pt"})
        checkpoint = safetensors_io.Checkpoint(directory)
        pieces = [(lead, first, len(rows)) for lead, first, rows in checkpoint.rows(path, "w")]
        self.assertEqual(pieces, [(lead, at, min(128, 1000 - at)) for lead in (0, 1) for at in range(0, 1000, 128)])
        rows = torch.cat([rows for *_, rows in checkpoint.rows(path, "w")])
        self.assertTrue(torch.equal(rows, weights.flatten(0, 1)))
        whole = list(safetensors_io.raw(path, checkpoint.headers[path], "w"))
        self.assertLessEqual(max(map(len, whole)), safetensors_io.PIECE_BYTES)
        self.assertEqual(b"".join(whole), bytes(safetensors_io.as_bytes(weights)))

    def test_a_base_that_shrinks_while_it_is_read_is_blamed_and_not_the_target(self) -> None:
        base, directory = checkpoint("llama"), temporary_directory() / "base"
        shutil.copytree(base.directory, directory)
        intended = merge_plan.plan(identified(directory), on_attention(base), "base")
        path = sorted(directory.glob("*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:-40])
        with self.assertRaisesRegex(ArtefactError, f"{path} became shorter"):
            merge.write(intended, temporary_directory(), "")
        path.unlink()
        with self.assertRaisesRegex(ArtefactError, f"cannot read {path}"):
            merge.write(intended, temporary_directory(), "")

    def test_content_of_another_size_than_planned_is_a_bug_that_is_seen(self) -> None:
        header = safetensors_io.plan({"w": safetensors_io.described("F32", (2, 2))}, {})
        with self.assertRaisesRegex(ValueError, "w has 12 bytes, 16 were planned"):
            safetensors_io.write(temporary_directory() / "x", header, lambda name: [b"x" * 12])


class Refused(unittest.TestCase):
    def refused(self, base: BaseModel, factors: Factors, *words: str, error: type[Exception] = ArtefactError) -> None:
        target = temporary_directory() / "merged"
        with self.assertRaises(error) as caught:
            merged(base, factors, target)
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertFalse(target.exists())

    def test_a_delta_without_a_tensor_is_named(self) -> None:
        base = checkpoint("minimax_m2")
        factors = on_attention(base)
        spare = factors["model.layers.0.self_attn.q_proj"]
        self.refused(base, factors | {"model.layers.7.self_attn.q_proj": spare}, "layers.7.self_attn.q_proj")
        fused = on_experts(base)["model.layers.0.mlp.experts.down_proj"]
        more = ModuleFactors(fused.a_rI.repeat(2, 1, 1), fused.b_Or.repeat(2, 1, 1), 1.0)  # 8 experts, the base has 4
        self.refused(base, {"model.layers.0.mlp.experts.down_proj": more}, "mlp.experts.down_proj")
        fewer = ModuleFactors(fused.a_rI[:3], fused.b_Or[:3], 1.0)
        self.refused(base, {"model.layers.0.mlp.experts.down_proj": fewer}, "experts.3.w2")

    def test_a_delta_of_another_shape_is_refused(self) -> None:
        base = checkpoint("minimax_m2")
        name = "model.layers.0.self_attn.q_proj"
        odd = ModuleFactors(torch.ones(2, 60), torch.ones(64, 2), 1.0)
        self.refused(base, {name: odd}, name, "(64, 60)", "(64, 64)")
        fused = "model.layers.1.mlp.experts.gate_up_proj"
        self.refused(base, {fused: odd}, "experts.0.w1")
        narrow = ModuleFactors(torch.ones(4, 2, 64), torch.ones(4, 100, 2), 1.0)
        self.refused(base, {fused: narrow}, "experts.0.w1", "(50, 64)")

    def test_a_sum_that_is_not_finite_is_not_published_and_not_kept(self) -> None:
        base = checkpoint("llama", torch.bfloat16)
        name = "model.layers.1.self_attn.v_proj"
        for value in (float("nan"), float("inf"), 3e38):
            factors = on_attention(base)
            factors[name].b_Or[3, 1] = value
            target = temporary_directory() / "merged"
            with self.assertRaisesRegex(NonFiniteError, name), mock.patch.object(merge_check, "refuse_too_large"):
                merged(base, factors, target)
            self.assertEqual(list(target.parent.iterdir()), [])

    def test_a_damaged_file_is_named_whatever_is_wrong_with_it(self) -> None:
        base = checkpoint("llama")
        path = sorted(base.directory.glob("*.safetensors"))[1]
        intact = path.read_bytes()
        length = int.from_bytes(intact[:8], "little")
        damages = {
            "empty": b"",
            "shorter than a length": intact[:5],
            "cut in the header": intact[: length // 2],
            "cut in the data": intact[:-3],
            "longer": intact + b"x",
            "length flipped": bytes([intact[0], intact[1], intact[2] ^ 4]) + intact[3:],
            "length absurd": intact[:7] + b"\xff" + intact[8:],
            "brace flipped": intact[:8] + bytes([intact[8] ^ 1]) + intact[9:],
            "offset flipped": intact.replace(b'"data_offsets":[', b'"data_offsets":[1', 1)[: len(intact)],
            "dtype flipped": intact.replace(b'"F32"', b'"F16"', 1),
            "not text": intact[:8] + b"\xff" * length + intact[8 + length :],
            "a list": with_header([]),
            "a number": with_header(12),
            "metadata no mapping": with_header({"__metadata__": [1, 2]}),
            "a tensor without a shape": with_header({"a": {"dtype": "F32"}}),
            "tensors that overlap": with_header({"a": float32_at(0), "b": float32_at(2), "c": float32_at(8)}, 12),
            "a gap": with_header({"a": float32_at(0), "b": float32_at(8)}, 12),
        }
        directory = temporary_directory() / "base"
        shutil.copytree(base.directory, directory)
        for damage, data in damages.items():
            (directory / path.name).write_bytes(data)
            with self.subTest(damage):
                self.refused(identified(directory), on_attention(base), path.name, "truncated or damaged")

    def test_a_missing_file_is_named(self) -> None:
        base, directory = checkpoint("llama"), temporary_directory() / "base"
        shutil.copytree(base.directory, directory)
        path = sorted(directory.glob("*.safetensors"))[1]
        path.unlink()
        self.refused(identified(directory), on_attention(base), path.name)

    def test_too_small_a_disk_is_told_to_the_byte_before_anything_is_written(self) -> None:
        base = checkpoint("llama", torch.bfloat16)
        target, _ = merged(base, on_attention(base), dtype="float32")
        copied = [base.directory / path for path in companion_files.companions(base.directory)]
        needed = sum(path.stat().st_size for path in (*copied, *target.glob("*.safetensors")))
        again = temporary_directory() / "merged"
        for free, fits in ((needed - 1, False), (needed, True)):
            usage = mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=free))
            with self.subTest(free=free), usage:
                if fits:
                    merged(base, on_attention(base), again, "float32")
                    continue
                with self.assertRaises(ArtefactError) as caught:
                    merged(base, on_attention(base), again, "float32")
                self.assertIn(f"{needed:,}", str(caught.exception))
                self.assertIn(f"{free:,}", str(caught.exception))
                self.assertEqual(list(partial(again).glob("*.safetensors")), [])

    def test_a_full_disk_names_the_path_and_what_is_written_is_kept(self) -> None:
        base = checkpoint("llama")
        full = OSError(28, "No space left on device")
        written = safetensors_io.write
        with mock.patch.object(safetensors_io, "write", side_effect=[written, full]) as writer:
            writer.side_effect = lambda path, *rest: written(path, *rest) if "00001" in path.name else _raise(full)
            target = temporary_directory() / "merged"
            with self.assertRaisesRegex(ArtefactError, rf"{target}.*No space left"):
                merged(base, on_attention(base), target)
        self.assertEqual([path.name[:11] for path in partial(target).glob("*.safetensors")], ["model-00001"])

    def test_a_target_in_the_way_is_refused_first(self) -> None:
        base, target = checkpoint("llama"), temporary_directory()
        (target / "mine.txt").write_text("x")
        with self.assertRaisesRegex(ArtefactError, "nothing is ever overwritten"):
            merged(base, {}, target)

    def test_a_failed_self_check_publishes_nothing_and_keeps_nothing(self) -> None:
        base, target = checkpoint("llama"), temporary_directory() / "merged"
        failing = mock.patch.object(merge_check, "merged_equals_composed", side_effect=VerificationError("wrong"))
        with failing, self.assertRaises(VerificationError):
            merged(base, on_attention(base), target, checked=True)
        self.assertEqual(list(target.parent.iterdir()), [])


def with_header(header: Any, data_bytes: int = 0) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def float32_at(offset: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [offset, offset + 4]}


def _raise(error: Exception) -> None:
    raise error


class Resumed(unittest.TestCase):
    def test_killed_and_started_again_gives_the_same_bytes_without_writing_finished_files_again(self) -> None:
        base = checkpoint("minimax_m2", torch.bfloat16)
        factors = on_attention(base) | on_experts(base)
        whole, checks = merged(base, factors)
        names = sorted(path.name for path in base.directory.glob("*.safetensors"))
        target = temporary_directory() / "merged"
        child = support._server().Process(target=killed_in, args=(names[2], base, factors, target))
        child.start()
        child.join(support.PATIENCE)
        self.assertEqual(child.exitcode, -signal.SIGKILL)
        self.assertFalse(target.exists())
        there = partial(target)
        self.assertEqual(sorted(path.name for path in there.glob("*.safetensors")), names[:3])
        record = resumable.read(there / merged_shards.RECORD, there.name)
        self.assertEqual(sorted(record or {}), names[:2])
        # of the finished two, one is damaged on the disk meanwhile; of the third there is a piece
        damaged = bytearray((there / names[1]).read_bytes())
        damaged[-5] ^= 1
        (there / names[1]).write_bytes(damaged)
        (there / names[2]).write_bytes(b"half")
        (there / f".{merged_shards.RECORD}.tmp-1").write_text("killed while the record was written")

        with mock.patch.object(safetensors_io, "write", wraps=safetensors_io.write) as writer:
            _, again = merged(base, factors, target)
        self.assertEqual([call.args[0].name for call in writer.call_args_list], names[1:])
        self.assertEqual(again, checks)
        self.assertFalse(there.exists())
        self.assertEqual({p.name for p in target.iterdir()}, {p.name for p in whole.iterdir()})
        for path in whole.iterdir():
            if path.name != "manifest.json":
                self.assertEqual((target / path.name).read_bytes(), path.read_bytes(), path.name)

    def test_what_is_there_needs_no_space_again(self) -> None:
        base = checkpoint("llama")
        target = temporary_directory() / "merged"
        interrupted = mock.patch.object(merge, "_write_companions", side_effect=KeyboardInterrupt)
        with contextlib.suppress(KeyboardInterrupt), interrupted:
            merged(base, on_attention(base), target)
        companions = sum((base.directory / p).stat().st_size for p in companion_files.companions(base.directory))
        with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=companions)):
            merged(base, on_attention(base), target)
        self.assertTrue(target.is_dir())


def killed_in(file: str, base: BaseModel, factors: Factors, target: Path) -> None:
    """In a process of its own: a merge that dies while it writes `file`."""
    content = merged_tensors.content

    def dying(plan: Any, path: Path, *rest: Any) -> Iterator[Any]:
        yield from content(plan, path, *rest)
        if path.name == file:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(merged_tensors, "content", dying):
        merged(base, factors, target)


class SelfCheck(unittest.TestCase):
    def test_a_merged_model_is_loaded_by_plain_transformers_in_a_fresh_process(self) -> None:
        base = checkpoint("minimax_m2", torch.bfloat16)
        factors = on_attention(base) | on_experts(base)
        target, checks = merged(base, factors, dtype="float32", checked=True)
        self.assertEqual(checks["checked_layers"], [0, 1])
        self.assertLess(checks["max_logit_difference"], 1e-5 * checks["largest_logit"])
        self.assertEqual([p.name for p in target.iterdir() if p.name.startswith(".")], [])
        (reloaded,) = support.plain_logits(IDS, str(target)).values()
        model = loading.load_model(base, SECTION, dtype=torch.float32)
        with torch.no_grad():
            composed = peft_model.add(model, "composed", factors)(IDS).logits
        self.assertLess(relative(reloaded, composed), 1e-5)

    def test_the_fresh_process_knows_nothing_of_this_project_and_refuses_to_have_loaded_peft(self) -> None:
        imported = set(test_architecture.imports(merge_check.RELOAD))
        self.assertEqual([name for name in imported if name.startswith(("utils", "config", "peft"))], [])
        importlib.import_module("peft")
        base, ids = checkpoint("llama"), temporary_directory() / "ids"
        save_file({"input_ids": IDS}, ids)
        with self.assertRaisesRegex(SystemExit, "brought in peft"):
            merged_logits.write_logits(str(base.directory), str(ids), str(ids.with_name("logits")))
        self.assertFalse(ids.with_name("logits").exists())

    def test_right_merges_pass_in_every_dtype(self) -> None:
        m2, llama = checkpoint("minimax_m2", torch.bfloat16), checkpoint("llama", torch.bfloat16)
        whole, partly = fp8_checkpoint(), fp8_checkpoint(160, 96)
        cases = [
            (llama, on_attention(llama), "base"),
            (llama, on_attention(llama), "float32"),
            (m2, on_attention(m2) | on_experts(m2), "base"),
            *((whole, on_attention(whole) | on_experts(whole), dtype) for dtype in ("base", "fp8")),
            # partial blocks, which transformers cannot read
            *((partly, on_experts(partly), dtype) for dtype in ("base", "fp8", "float32")),
        ]
        for base, factors, dtype in cases:
            target, _ = merged(base, factors, dtype=dtype)
            with self.subTest(base=base.directory.name, dtype=dtype):
                checks = checked_here(base, factors, target)
                self.assertEqual(checks["rounded"], dtype != "float32")
                # what a last bit of float32 moves: sums are taken in an order that the CPU's kernels choose
                written = {"base": torch.bfloat16, "fp8": torch.float8_e4m3fn, "float32": torch.float32}[dtype]
                last_bit = torch.finfo(torch.float32).eps
                self.assertLess(checks["max_weight_difference"], (last_bit * torch.finfo(written).eps) ** 0.5)
                self.assertLess(checks["max_logit_difference_to_rounded"], 1e-5 * checks["largest_logit"])
                self.assertFalse((target / merge_check.SCRATCH).exists())

    def test_weights_may_differ_by_what_a_sum_in_another_order_moves_after_rounding(self) -> None:
        draw = torch.Generator().manual_seed(0)
        sums = torch.randn(1000, 1000, generator=draw, dtype=torch.float64)
        for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32):
            allowed = merge_check.weight_tolerance(dtype)
            for off, is_right in ((3e-8, True), (3e-7, True), (1e-3, False)):
                moved = sums * (1 + off * torch.randn(sums.shape, generator=draw, dtype=torch.float64))
                with self.subTest(dtype=dtype, off=off):
                    rounded, other = sums.float().to(dtype).double(), moved.float().to(dtype).double()
                    share = float((other - rounded).norm() / rounded.norm())
                    self.assertEqual(share < allowed, is_right, share)
                    if not is_right:
                        self.assertGreater(share, 10 * allowed)

    def test_a_model_larger_than_memory_is_checked_on_some_layers(self) -> None:
        for architecture in ("llama", "minimax_m2"):
            base = checkpoint(architecture, torch.bfloat16, 5)
            factors = on_attention(base) | on_experts(base)
            target, _ = merged(base, factors)
            shared, layer = layer_sample._float32_bytes(safetensors_io.Checkpoint(base.directory))
            for count, layers in ((1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4])):
                with self.subTest(architecture, count=count):
                    room = shared + layer * (count + layer_sample.TRANSIENT_LAYERS)
                    self.assertEqual(checked_here(base, factors, target, room)["checked_layers"], layers)
                    with self.assertRaisesRegex(ArtefactError, "what is not checked is not published"):
                        checked_here(base, factors, target, shared + layer * layer_sample.TRANSIENT_LAYERS)

    def test_a_small_model_has_the_chosen_layers_renumbered_and_all_that_is_outside_of_layers(self) -> None:
        base, directory, small = (
            fp8_checkpoint(160, 96),
            temporary_directory() / "base",
            temporary_directory() / "small",
        )
        shutil.copytree(base.directory, directory)
        settings = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(settings | {"attn_type_list": ["first", "second"]}))
        layer_sample.write(safetensors_io.Checkpoint(directory), [1], small)
        before, after = dequantised_by_hand(state_of(directory)), state_of(small)
        expected = {n.replace("layers.1.", "layers.0."): t for n, t in before.items() if "layers.0." not in n}
        self.assertEqual(after.keys(), expected.keys())
        for name, tensor in after.items():
            self.assertTrue(torch.equal(tensor.float(), expected[name]), name)
        described = json.loads((small / "config.json").read_text())
        self.assertEqual((described["num_hidden_layers"], described["attn_type_list"]), (1, ["second"]))
        self.assertNotIn("quantization_config", described)  # its partial blocks are float32 here
        self.assertEqual(described["hidden_size"], settings["hidden_size"])

    def test_layers_that_the_adapter_changes_are_preferred(self) -> None:
        base = checkpoint("llama", torch.bfloat16, 5)
        factors = {n: f for n, f in on_attention(base).items() if "layers.3" in n}
        target, _ = merged(base, factors)
        shared, layer = layer_sample._float32_bytes(safetensors_io.Checkpoint(base.directory))
        room = shared + layer * (2 + layer_sample.TRANSIENT_LAYERS)
        self.assertEqual(checked_here(base, factors, target, room)["checked_layers"], [3])

    def test_one_altered_tensor_fails_the_check_in_a_sampled_and_in_a_whole_model(self) -> None:
        base = checkpoint("minimax_m2", torch.bfloat16, 5)
        factors = on_attention(base) | on_experts(base)
        intact, _ = merged(base, factors)
        before = state_of(base.directory)
        shared, layer = layer_sample._float32_bytes(safetensors_io.Checkpoint(base.directory))
        alterations: dict[str, Callable[[torch.Tensor, str], torch.Tensor]] = {
            # the update is missing, is there twice, is another module's; a row, a value, a sign is wrong
            "model.layers.4.self_attn.v_proj.weight": lambda t, name: before[name],
            "model.layers.2.block_sparse_moe.experts.3.w2.weight": lambda t, name: 2 * t - before[name],
            "model.layers.0.block_sparse_moe.experts.0.w1.weight": lambda t, name: before[name.replace("w1", "w3")],
            "model.layers.2.block_sparse_moe.gate.weight": lambda t, name: t.roll(1, 0),
            "model.layers.0.block_sparse_moe.e_score_correction_bias": lambda t, name: -t,
            "model.layers.4.input_layernorm.weight": lambda t, name: t * 1.01,
            "lm_head.weight": lambda t, name: torch.cat([t[:-1], t[-1:] * float("nan")]),
            "model.layers.4.self_attn.q_norm.weight": lambda t, name: t * float("nan"),
        }
        for room in (None, shared + layer * (3 + layer_sample.TRANSIENT_LAYERS)):
            for name, alter in alterations.items():
                target = temporary_directory() / "altered"
                shutil.copytree(intact, target)
                path = safetensors_io.Checkpoint(target).homes[name]
                state = load_file(path)
                save_file(state | {name: alter(state[name], name).contiguous()}, path, metadata={"format": "pt"})
                with self.subTest(name, room=room), self.assertRaisesRegex(VerificationError, name):
                    checked_here(base, factors, target, room)

    def test_a_directory_that_computes_something_else_than_its_weights_say_fails(self) -> None:
        base = checkpoint("llama", torch.bfloat16)
        factors = on_attention(base)
        target, _ = merged(base, factors)
        settings = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
        with self.assertRaisesRegex(VerificationError, "logits differ"):
            checked_here(base, factors, target)
        (target / "config.json").write_text(json.dumps(settings | {"hidden_size": 32}))
        forks = mock.patch.object(merge_check, "subprocess", mock.Mock(run=support.reloaded_in_a_fork))
        with forks, self.assertRaisesRegex(VerificationError, "does not load"):
            merge_check.merged_equals_composed(base, factors, target, SECTION)

    def test_an_adapter_without_effect_and_one_lost_in_rounding_fail(self) -> None:
        base = checkpoint("llama", torch.bfloat16)
        for size, reason in ((0.0, "do not change"), (0.003, "most of what the adapters do")):
            factors = on_attention(base, size=size)
            target, _ = merged(base, factors)
            with self.subTest(reason), self.assertRaisesRegex(VerificationError, reason):
                checked_here(base, factors, target)
