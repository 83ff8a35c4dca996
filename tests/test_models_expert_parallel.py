"""Which experts can be shared, what is refused, and the product of rows with the updates of their experts."""

from __future__ import annotations

import unittest
from array import array
from unittest import mock

import torch

from tests import toy_architectures
from tests.support import relative
from utils.models.parallel import expert_parallel
from utils.models.process_layout import ProcessLayout

SHARED = ProcessLayout(1, 4, 2)
WITH_PLAN = ("minimax_m2", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss")


class Refusals(unittest.TestCase):
    def test_mixtures_with_a_plan_can_be_shared(self) -> None:
        for name in WITH_PLAN:
            self.assertEqual(expert_parallel.problems(toy_architectures.model(name), SHARED), [], name)

    def test_a_model_without_a_plan_and_ranks_that_do_not_divide_are_said_all_at_once(self) -> None:
        model = toy_architectures.model("minimax_m2")
        for layout, said in (
            (ProcessLayout(1, 6, 3), ["4 experts cannot be divided among 3 ranks"]),
            (ProcessLayout(1, 8, 3), ["no whole number of groups", "4 experts cannot be divided among 3 ranks"]),
            (ProcessLayout(4, 1, 2), ["here each has all of it"]),
        ):
            found = expert_parallel.problems(model, layout)
            self.assertEqual(len(found), len(said), found)
            for problem, words in zip(found, said, strict=True):
                self.assertIn(words, problem.what)
                self.assertEqual((problem.value, "expert_parallel off" in problem.fix), (layout.expert, True))
        (found,) = expert_parallel.problems(toy_architectures.model("llama"), SHARED)
        self.assertIn("no expert plan for LlamaForCausalLM", found.what)


class Products(unittest.TestCase):
    def test_rows_with_updates_are_those_of_updated_weights_with_their_gradients(self) -> None:
        for name in WITH_PLAN:
            with self.subTest(name):
                model = toy_architectures.model(name).requires_grad_(False)
                experts, names = list(expert_parallel.modules(model).values())[-1]
                generator = torch.Generator().manual_seed(5)
                ids = torch.tensor([3, 0, 0, 3, 1])  # no row for expert 2
                x = torch.randn(5, 64, generator=generator)
                updates, weights = {}, {}
                for parameter in (n for n in names if not n.endswith("_bias")):
                    weight = getattr(experts, parameter)
                    shape = weight.mT.shape if experts.is_transposed else weight.shape
                    a = (torch.randn(4, 3, shape[2], generator=generator) * 0.1).requires_grad_()
                    b = (torch.randn(4, shape[1], 3, generator=generator) * 0.1).requires_grad_()
                    updates[parameter] = [(a, b, 2.0)]
                    delta = 2.0 * b @ a
                    weights[parameter] = weight + (delta.mT if experts.is_transposed else delta)
                found = expert_parallel.with_updates(experts, x, ids, updates)
                expected = torch.func.functional_call(experts, weights, (x, ids[:, None], torch.ones(5, 1)))
                self.assertLess(relative(found, expected), 1e-5)
                factors = [tensor for (update,) in updates.values() for tensor in update[:2]]
                pairs = zip(*(torch.autograd.grad(y.square().sum(), factors) for y in (found, expected)), strict=True)
                for one, other in pairs:
                    self.assertLess(relative(one, other), 1e-4)
                    self.assertEqual(float(one[2].abs().max()), 0.0)  # part of the graph, though it had no row


class Rows(unittest.TestCase):
    def test_the_largest_is_that_of_each_exchange(self) -> None:
        def all_gather(everyone: list[torch.Tensor], mine: torch.Tensor, group: object) -> None:
            everyone[0].copy_(mine)
            everyone[1].copy_(torch.tensor([1, 3, 5]))

        team = mock.Mock(size=2)
        with (
            mock.patch.object(expert_parallel, "_rows", array("q", [3, 1, 5])) as rows,
            mock.patch.object(expert_parallel.ranks, "team", return_value=team),
            mock.patch.object(expert_parallel.dist, "all_gather", all_gather),
        ):
            # three of four, three of four, half: each rank has nine of eighteen, and waits twice
            self.assertEqual(expert_parallel.rows_of_exchanges(), (11, 9.0))
            expert_parallel.count_rows()
            self.assertEqual(len(rows), 0)


if __name__ == "__main__":
    unittest.main()
