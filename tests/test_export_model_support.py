"""What `verify.py BASE` says of a person's own model: every stage tried on it, or the reason for which none is."""

from __future__ import annotations

import contextlib
import io
import unittest
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from scripts import verify
from tests import support_matrix, toy_architectures
from tests.support import temporary_directory
from utils import cli
from utils.export import merge_check, model_support
from utils.models import losses
from utils.models.structure import linear_modules


def verified(base: Path) -> dict[str, Any]:
    """What the script returns; the merged model is reloaded in this process, because a fresh one takes ten seconds."""
    config = cli.resolve(["--verify.path", str(base), "--run.models_dir", str(temporary_directory())], {})
    with (
        contextlib.redirect_stdout(io.StringIO()) as shown,
        mock.patch.object(merge_check, "_reloaded", support_matrix._reloaded),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        found = verify.main(config)
    return found | {"shown": shown.getvalue()}


class Rows(unittest.TestCase):
    def test_a_model_that_works_works_in_every_column(self) -> None:
        base = toy_architectures.build("qwen2_moe", temporary_directory() / "mine")
        found = verified(base)
        self.assertEqual(list(found["support"]), list(model_support.COLUMNS))
        self.assertEqual([said for said in found["support"].values() if not said.startswith("works")], [])
        self.assertIn("streamed merge", found["shown"])
        self.assertFalse((base / "adapter_config.json").exists())

    def test_a_model_that_cannot_be_adapted_is_refused_in_every_column_with_the_remedy(self) -> None:
        base = toy_architectures.build("llama", temporary_directory() / "mine", template="{{ raise_exception('no') }}")
        found = verified(base)
        self.assertTrue(
            all(said.startswith(("refused", "fails")) for said in found["support"].values()), found["support"]
        )

    def test_what_is_wrong_on_the_model_is_seen(self) -> None:
        base = toy_architectures.build("llama", temporary_directory() / "mine")

        class Twisted(losses.NextTokenLoss):
            def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
                return 1.01 * super().forward(*arguments)

        with mock.patch.object(model_support, "NextTokenLoss", Twisted):
            self.assertIn("fails: the loss is not the model's own", verified(base)["support"]["domain training"])
        with mock.patch.object(linear_modules, "_read_weights", return_value=frozenset({"q_proj"})):
            self.assertNotIn("q_proj,", verified(base)["support"]["domain training"])


if __name__ == "__main__":
    unittest.main()
