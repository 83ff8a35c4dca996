"""What becomes of an FP8 checkpoint: the choice by hardware, the bytes it takes and finds, what is trained on it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import unittest
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, MiniMaxM2Config

from config import ATTENTION, PRESETS, Config, LoraSection
from tests import minimax_support
from tests.support import relative, saved_model, temporary_directory
from utils import cli, logger
from utils.adapters import peft_model
from utils.exceptions import ArtefactError, ConfigError
from utils.models import devices, loading
from utils.models.architectures import minimax_m2
from utils.models.losses import NextTokenLoss, autocast
from utils.models.model_shapes import GIB
from utils.planning import estimates, preflight
from utils.planning.memory import native_fp8
from utils.planning.memory.native_fp8 import Facts, choose
from utils.planning.preflight import Machine
from utils.training import training_identity, training_run

H100 = Facts(capability=(9, 0), kernels="", on_experts=False, computes_in="bfloat16")
M2 = minimax_m2.sizes(minimax_m2.PUBLISHED)
LORA = LoraSection(rank=4, alpha=8, target_modules=ATTENTION)
IDS = torch.randint(8, 700, (2, 24), generator=torch.Generator().manual_seed(3))


def resolve(*arguments: str) -> Config:
    return cli.resolve(["--preset", "minimax_m2", *arguments], {})


@contextmanager
def hardware(capability: tuple[int, int] | None, kernels: str = "") -> Iterator[None]:
    """This process has this GPU, or none, and these FP8 kernels (empty), or not (why not)."""
    with ExitStack() as stack:
        device = torch.device("cpu" if capability is None else "cuda")
        stack.enter_context(mock.patch.object(devices, "device", return_value=device))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=capability))
        stack.enter_context(mock.patch.object(preflight, "_missing_kernels", return_value=kernels))
        yield


class Choice(unittest.TestCase):
    def test_weights_stay_fp8_only_where_all_four_facts_allow_it(self) -> None:
        capabilities = {None: False, (8, 0): False, (8, 6): False, (8, 9): True, (9, 0): True, (10, 0): True}
        for (capability, can), kernels, on_experts, computes in itertools.product(
            capabilities.items(), ("", "no kernels"), (False, True), ("bfloat16", "float32")
        ):
            facts = Facts(capability, kernels, on_experts, computes)
            wanted = can and not kernels and not on_experts and computes == "bfloat16"
            with self.subTest(facts):
                found = choose("auto", facts)
                self.assertEqual(found.native, wanted)
                self.assertTrue(found.why)
                self.assertFalse(choose("dequantise", facts).native)
                if wanted:
                    self.assertTrue(choose("native", facts).native)
                else:
                    with self.assertRaisesRegex(ArtefactError, "--base.fp8 native cannot be"):
                        choose("native", facts)

    def test_every_reason_is_told_at_once_with_what_mends_it(self) -> None:
        facts = Facts((8, 0), "", on_experts=True, computes_in="float32")
        with self.assertRaises(ArtefactError) as caught:
            choose("native", facts)
        for part in ("compute capability 8.0, FP8 takes 8.9", "FP8 experts is silently wrong", "base.dtype is float32"):
            self.assertIn(part, str(caught.exception))
        self.assertIn("--base.fp8 dequantise", str(caught.exception))
        self.assertIn("there is no GPU", choose("auto", dataclasses.replace(H100, capability=None)).why)
        self.assertIn("8.9", choose("auto", dataclasses.replace(H100, capability=(8, 9))).why)

    def test_the_machine_and_the_settings_give_the_facts(self) -> None:
        experts = ["--domain.lora.experts=true"]
        for name, machine, flags, stage, native in (
            ("H100", (9, 0), [], "task", True),
            ("H100, told not to", (9, 0), ["--base.fp8=dequantise"], "task", False),
            ("A100", (8, 0), [], "task", False),
            ("CPU", None, [], "domain", False),
            ("experts", (9, 0), experts, "domain", False),
            ("experts below", (9, 0), experts, "task", False),
            ("experts not below", (9, 0), [*experts, "--task.on=base"], "task", True),
            ("float32", (9, 0), ["--base.dtype=float32"], "domain", False),
        ):
            with self.subTest(name), hardware(machine):
                self.assertEqual(preflight.keep_fp8(resolve(*flags), stage).native, native)
        with hardware((9, 0), kernels="`kernels` is not installed"):
            self.assertEqual(
                preflight.keep_fp8(resolve(), "task"), native_fp8.Fp8Choice(False, "`kernels` is not installed")
            )

    def test_kernels_are_asked_of_transformers_itself(self) -> None:
        preflight._missing_kernels.cache_clear()
        self.addCleanup(preflight._missing_kernels.cache_clear)
        loads = "transformers.integrations.finegrained_fp8.load_finegrained_fp8_kernel"
        with mock.patch(loads, side_effect=ImportError("`kernels` is not installed\nmore")):
            self.assertEqual(preflight._missing_kernels(), "`kernels` is not installed")
        preflight._missing_kernels.cache_clear()
        with mock.patch(loads):
            self.assertEqual(preflight._missing_kernels(), "")

    def test_contradictions_are_refused_before_anything_is_loaded(self) -> None:
        for flags, said in (
            (["--task.lora.experts=true"], "task.lora.experts with base.fp8 native"),
            (["--domain.lora.experts=true"], "domain.lora.experts with base.fp8 native"),
            (["--base.dtype=float32"], "base.fp8 native computes in bfloat16"),
        ):
            with self.subTest(said), self.assertRaises(ConfigError) as caught:
                resolve("--base.fp8=native", *flags)
            self.assertIn(said, str(caught.exception))
        base = saved_model("minimax_m2")
        with self.assertRaisesRegex(ArtefactError, "is no FP8 checkpoint"):
            preflight.form(resolve("--base.fp8=native"), "domain", base)


class Memory(unittest.TestCase):
    """Bytes are compared with what is there before anything is fetched or read."""

    def checked(self, machine: Machine, stage: str, *flags: str) -> None:
        with mock.patch.object(Machine, "here", return_value=machine):
            preflight.check(resolve(*flags), stage=stage)

    def test_half_the_memory_is_enough_exactly_where_the_weights_stay_fp8(self) -> None:
        # 214.3 GiB over 8 GPUs are 26.8 each, 426.1 are 53.3; a pass gathers a layer beside them
        whole = estimates.weight_bytes(M2, "bfloat16")
        part = (whole / 8 + whole * estimates.gathered_parameters(M2) / M2.total) / GIB
        self.assertGreater(part, 53.3)
        said = f"{part:.1f} GiB of GPU memory"
        node = Machine(shards=8, local=8, gpu_bytes=40 * GIB, host_bytes=512 * GIB)
        with hardware((9, 0)):
            self.checked(node, "task")
            for flags in (["--base.fp8=dequantise"], ["--task.lora.experts=true"]):
                with self.subTest(flags), self.assertRaisesRegex(ArtefactError, f"{said} per rank"):
                    self.checked(node, "task", *flags)
            with self.assertRaisesRegex(ArtefactError, "only training can keep it FP8"):
                self.checked(node, "")
        with hardware((8, 0)), self.assertRaises(ArtefactError) as caught:
            self.checked(node, "task")
        for words in (said, "40.0 GiB are there", "stored in FP8 (214.3 GiB) and de-quantised"):
            self.assertIn(words, str(caught.exception))
        self.assertIn("compute capability 8.0, FP8 takes 8.9", str(caught.exception))

    def test_host_memory_is_compared_too_and_small_models_are_not_left_out(self) -> None:
        host = Machine(shards=1, local=1, gpu_bytes=0, host_bytes=300 * GIB)
        with hardware(None), self.assertRaisesRegex(ArtefactError, "426.1 GiB of main memory, 300.0 GiB are there"):
            self.checked(host, "domain")
        small = Machine(shards=1, local=1, gpu_bytes=0, host_bytes=1 << 20)
        with hardware(None), self.assertRaisesRegex(ArtefactError, "of main memory, 0.0 GiB are there"):
            self.checked(small, "domain", f"--base.source={minimax_support.checkpoint('fp8')}")

    def test_native_is_refused_with_its_reason_before_the_memory_is(self) -> None:
        with hardware(None), self.assertRaisesRegex(ArtefactError, "native cannot be: there is no GPU"):
            self.checked(Machine(1, 1, 0, 1 << 40), "task", "--base.fp8=native")


class Loaded(unittest.TestCase):
    def test_training_loads_fp8_as_fp8_there_and_everything_else_de_quantises(self) -> None:
        base, section = minimax_support.fetched("fp8"), minimax_support.section("fp8")
        config = cli.resolve(
            ["--preset", "tiny_minimax_m2", "--base.source", section.source, "--base.dtype", "bfloat16"], {}
        )
        native = native_fp8.Fp8Choice(True, "as on a GPU")
        data = mock.Mock(digest="d")
        with minimax_support.fp8_on_this_cpu():
            with mock.patch.object(preflight, "keep_fp8", return_value=native):
                kept = training_run.load_base(config, "domain", base)
                self.assertEqual(training_identity.identity_of(config, "domain", base, data).values["fp8"], "native")
            plain = training_run.load_base(config, "domain", base)
            self.assertNotIn("fp8", training_identity.identity_of(config, "domain", base, data).values)
            dtypes = [m.model.layers[0].mlp.experts.down_proj.dtype for m in (kept, plain)]
            self.assertEqual(dtypes, [torch.float8_e4m3fn, torch.bfloat16])
            self.assertEqual(loading.load_model(base, section).model.layers[0].self_attn.q_proj.weight.dtype, dtypes[1])
            self.assertFalse(any(p.requires_grad for p in kept.parameters()), "block factors are parameters too")
            kept.set_experts_implementation("eager")
            with torch.no_grad():
                found = [m(IDS, use_cache=False).logits.float() for m in (kept, plain)]
        self.assertLess(relative(*found), 0.1)

    def test_attention_adapters_learn_over_fp8_as_over_bfloat16_and_recomputing_changes_nothing(self) -> None:
        def losses(*, native: bool, recomputes: bool) -> list[float]:
            loaded = minimax_support.load_native_fp8() if native else loading.load_model(base, section)
            model = training_run.new_adapter(loaded, "task", LORA, 0).train()
            if recomputes:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": False})
            optimizer = torch.optim.AdamW(peft_model.trainable_parameters(model).values(), lr=1e-2)
            positions, found = torch.arange(IDS.shape[1]).expand_as(IDS), []
            for _ in range(5):
                with autocast(model, torch.device("cpu")):
                    loss = NextTokenLoss(model)(IDS, positions, IDS) / IDS.numel()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(float(loss.detach()))
            return found

        base, section = minimax_support.fetched("fp8"), minimax_support.section("fp8")
        with minimax_support.fp8_on_this_cpu():
            native, again = (losses(native=True, recomputes=recomputes) for recomputes in (False, True))
            plain = losses(native=False, recomputes=False)
        self.assertEqual(native, again)
        self.assertLess(native[-1], 0.8 * native[0], "nothing was learnt")
        for one, other in zip(native, plain, strict=True):
            self.assertAlmostEqual(one / other, 1, delta=0.01)

    def test_attention_adapters_of_the_real_shape_have_exactly_their_parameters(self) -> None:
        """On the meta device: what PEFT attaches to all 62 layers, not what arithmetic says."""
        settings = MiniMaxM2Config(**{k: v for k, v in minimax_m2.PUBLISHED.items() if k != "quantization_config"})
        with torch.device("meta"), logger.quiet_transformers():
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
        lora = PRESETS["minimax_m2"]().task.lora
        model = training_run.new_adapter(model.requires_grad_(False), "task", lora, 0)
        trained = peft_model.trainable_parameters(model)
        self.assertEqual(sum(parameter.numel() for parameter in trained.values()), 26_411_008)
        self.assertEqual(len(trained), 62 * 4 * 2)
        self.assertEqual({parameter.dtype for parameter in trained.values()}, {torch.float32})
        self.assertFalse([name for name in trained if "gate" in name or "lm_head" in name or "experts" in name])
        base = mock.Mock(directory=temporary_directory())
        (base.directory / "config.json").write_text(json.dumps(minimax_m2.PUBLISHED))
        preflight.check_trainable(model, resolve(), "task", base)
        model.base_model.model.lm_head.weight.requires_grad_(True)
        with self.assertRaisesRegex(ArtefactError, "the task adapter's settings ask for 26,411,008"):
            preflight.check_trainable(model, resolve(), "task", base)


if __name__ == "__main__":
    unittest.main()
