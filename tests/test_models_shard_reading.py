"""Each rank reads its rows of a sharded model: the same numbers as the whole model, whatever the files and the cut."""

from __future__ import annotations

import unittest
from dataclasses import replace
from unittest import mock

import torch

from config import BaseModelSection
from tests.support import saved_model
from tests.test_export_merge import fp8_checkpoint
from utils.exceptions import VerificationError
from utils.models import loading
from utils.models.base_model import BaseModel
from utils.models.parallel import shard_reading
from utils.models.parallel.shard_reading import ShardReader
from utils.models.weights import fp8

META = torch.device("meta")


def section(base: BaseModel, dtype: str) -> BaseModelSection:
    return BaseModelSection(source=str(base.directory), dtype=dtype)


def reader(base: BaseModel, dtype: str = "float32") -> tuple[ShardReader, torch.nn.Module]:
    model = loading.load_model(base, section(base, dtype), place=META)
    found = shard_reading.reader(base, model)
    assert found is not None
    return found, model


def cuts(rows: int, ranks: int) -> list[tuple[int, int]]:
    """First and last row of each rank, as torch cuts: the last ones may have fewer, or none."""
    step = -(-rows // ranks)
    return [(min(rows, rank * step), min(rows, (rank + 1) * step)) for rank in range(ranks)]


class SameAsWhole(unittest.TestCase):
    def test_the_parts_of_all_ranks_are_the_model_that_transformers_loads(self) -> None:
        for base in (saved_model("minimax_m2"), saved_model("llama"), fp8_checkpoint()):
            for dtype in ("float32", "bfloat16"):
                whole = loading.load_model(base, section(base, dtype))
                found, _ = reader(base, dtype)
                for ranks in (2, 3, 7):
                    with self.subTest(f"{base.directory.name} {dtype} {ranks}"):
                        for name, parameter in whole.named_parameters():
                            parts = [
                                found.rows(name, first, last, parameter.dtype)
                                for first, last in cuts(len(parameter), ranks)
                                if first < last
                            ]
                            self.assertTrue(torch.equal(torch.cat(parts), parameter), name)

    def test_a_placeholder_model_has_all_buffers_and_no_memory(self) -> None:
        for base in (saved_model("minimax_m2"), saved_model("llama")):
            found, model = reader(base)
            self.assertTrue(shard_reading.as_placeholders(model, found))
            whole = loading.load_model(base, section(base, "float32"))
            expected = dict(whole.named_buffers())
            self.assertEqual(set(dict(model.named_buffers())), set(expected))
            for name, buffer in model.named_buffers():
                self.assertTrue(torch.equal(buffer, expected[name]), name)
            for name, parameter in model.named_parameters():
                self.assertEqual(parameter.device.type, "cpu")
                self.assertLessEqual(parameter.untyped_storage().nbytes(), 8)
                self.assertEqual(parameter.shape, whole.get_parameter(name).shape)

    def test_a_rank_asks_for_about_its_share_of_the_bytes(self) -> None:
        base = saved_model("minimax_m2")
        _, model = reader(base)
        asked = []
        for rank in range(2):
            found, _ = reader(base)
            for name, parameter in model.named_parameters():
                first, last = cuts(len(parameter), 2)[rank]
                found.rows(name, first, last, parameter.dtype)
            asked.append(found.bytes_read)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self.assertEqual(sum(asked), size)
        self.assertLess(max(asked), 0.6 * size)


class Compared(unittest.TestCase):
    def test_rows_that_are_not_those_of_the_file_are_found(self) -> None:
        base = fp8_checkpoint()
        found, model = reader(base, "bfloat16")
        local = {n: (0, found.rows(n, 0, len(p), p.dtype)) for n, p in model.named_parameters()}
        found.compare(local, seed=0)
        for seed in range(3):
            changed = {name: (first, rows * 1.02) for name, (first, rows) in local.items()}
            with self.assertRaisesRegex(VerificationError, r"rows \d+ to \d+ of .* are not those of its file"):
                found.compare(changed, seed=seed)

    def test_scales_that_are_counted_from_a_rows_own_beginning_are_found(self) -> None:
        """What a library does that cuts rows first and dequantizes them afterwards."""
        base, first = fp8_checkpoint(hidden=256), 86
        found, model = reader(base, "bfloat16")
        name = next(n for n, p in model.named_parameters() if n.endswith("o_proj.weight"))
        rows, height = len(model.get_parameter(name)), found.checkpoint.block[0]

        def as_cut(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
            skipped = first % height
            return torch.cat([values[:skipped].float(), fp8_dequantise(values[skipped:], scales, block)])

        fp8_dequantise = fp8.dequantise
        with mock.patch.object(shard_reading.fp8, "dequantise", as_cut):
            wrong = found.rows(name, first, rows, torch.bfloat16)
        found.compare({name: (first, found.rows(name, first, rows, torch.bfloat16))}, seed=0)
        with self.assertRaises(VerificationError):
            found.compare({name: (first, wrong)}, seed=0)


class Refused(unittest.TestCase):
    def test_what_is_not_rows_or_experts_of_its_files_is_left_to_the_first_rank(self) -> None:
        base = saved_model("minimax_m2")
        found, model = reader(base)
        names = list(found.places)
        with mock.patch.object(shard_reading.tensor_names, "places", return_value={names[0]: mock.Mock()}):
            self.assertIsNone(shard_reading.reader(base, model))
        with mock.patch.object(shard_reading.layer_sample, "has_partial_blocks", return_value=True):
            self.assertIsNone(shard_reading.reader(replace(base), model))


if __name__ == "__main__":
    unittest.main()
