"""A sample of the support matrix in docs/models.md; `make models-test` measures every row and writes the table."""

from __future__ import annotations

import json
import unittest
import warnings

import torch

from scripts import prepare_data
from tests import odd_architecture, support_matrix, toy_architectures
from tests.programs import write_support_matrix
from tests.support import temporary_directory
from tests.support_matrix import COLUMNS, REFUSED, WORKS, WRONG, Cell
from tests.test_export_model_support import verified
from tests.toy_architectures import SPECS

# one of each kind: dense, eager only, multimodal, hybrid, fused and shared experts, inputs first, other names, learned
# positions, no masks by position, a state space
SAMPLE = (
    *("qwen3", "gemma2", "gemma3", "qwen3_5", "glm4_moe"),
    *("gpt_oss", "granitemoe", "gpt2", "falcon", "mamba"),
)


class Rows(unittest.TestCase):
    def test_a_sample_of_architectures_works_in_every_column(self) -> None:
        """By `verify.py BASE`, which tries every stage; all of them through every script take a quarter of an hour."""
        for name in SAMPLE:
            base = toy_architectures.build(name, temporary_directory() / name)
            with self.subTest(name):
                found = verified(base)["support"]
                self.assertEqual(set(found), set(COLUMNS))
                self.assertEqual({column: said for column, said in found.items() if not said.startswith("works")}, {})

    def test_one_of_them_goes_through_every_script(self) -> None:
        base = toy_architectures.build("gemma3", temporary_directory() / "gemma3")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cells = support_matrix.row(base)
        self.assertEqual(write_support_matrix.bad({"gemma3": cells}), [])
        self.assertEqual({cell.verdict for cell in cells.values()}, {WORKS})

    def test_documents_of_a_model_that_mixes_what_shares_a_row_are_trained_one_in_each(self) -> None:
        base = toy_architectures.build("lfm2", temporary_directory() / "lfm2")
        place = support_matrix.Place(base, root := temporary_directory(), root / "data")
        place.run(prepare_data, *support_matrix.sources(place.data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            difference, allowed = support_matrix._Checks(place, ()).of("domain training")
        self.assertLessEqual(difference, allowed)


class Unknown(unittest.TestCase):
    def test_an_architecture_that_nobody_heard_of_is_trained_scored_and_merged_rightly(self) -> None:
        odd_architecture.register()
        base = temporary_directory() / "odd"
        torch.manual_seed(0)
        # its layers lie in lists of a list, so that no list has as many as config.json says
        config = odd_architecture.OddConfig(eos_token_id=1, floors=4, houses=[1, 3], street=True)
        model = toy_architectures.awake(odd_architecture.OddForCausalLM(config))
        model.save_pretrained(base)
        toy_architectures.tokenizer().save_pretrained(base)
        cells = support_matrix.row(base)
        self.assertEqual(write_support_matrix.bad({"odd": cells}), [])
        self.assertEqual({cell.verdict for cell in cells.values()}, {WORKS}, "it could be adapted")


class Table(unittest.TestCase):
    def test_the_page_has_a_row_for_every_architecture_and_no_cell_is_wrong_or_fails_later(self) -> None:
        page = write_support_matrix.PAGE.read_text(encoding="utf-8")
        table = page.partition(write_support_matrix.BEGIN)[2].partition(write_support_matrix.END)[0]
        lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
        header, rows = lines[0], {name: rest for name, *rest in lines[1:]}
        self.assertEqual(header, ["architecture", "class", *COLUMNS])
        self.assertEqual({name: rest[0] for name, rest in rows.items()}, {n: s[1] for n, s in SPECS.items()})
        cells = {cell.split()[0] for _, *found in rows.values() for cell in found}
        self.assertLessEqual(cells, {WORKS, REFUSED})

    def test_a_reference_that_differs_is_called_wrong(self) -> None:
        cells = {column: Cell(WORKS, 1e-7) for column in COLUMNS} | {"evaluate": Cell(WRONG, 0.3)}
        self.assertEqual(len(write_support_matrix.bad({"x": cells})), 1)

    def test_the_reference_scores_each_text_alone(self) -> None:
        base = toy_architectures.build("llama", temporary_directory() / "llama")
        model = support_matrix.stock(base)
        ids = list(range(10, 30))
        alone = support_matrix.nll(model, ids, 12)
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        expected = -torch.stack([scores[at - 1, ids[at]] for at in range(12, 20)])
        self.assertLess(float((alone - expected).abs().max()), 1e-5)
        self.assertEqual(json.loads((base / "config.json").read_text())["architectures"], ["LlamaForCausalLM"])


if __name__ == "__main__":
    unittest.main()
