"""The end of a turn, what stands before an answer, and reasoning: as the chat template writes them."""

from __future__ import annotations

import itertools
import json
import unittest
import unittest.mock
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import temporary_directory
from utils import logger
from utils.data.pair_rows import tokenise_pairs
from utils.exceptions import DataError
from utils.inference import generation, scoring, stop_tokens
from utils.models import chat, turn_format
from utils.models.architectures import toy

MARKS = ["<start_of_turn>", "<end_of_turn>", "<|user|>", "<|model|>", "<|end|>", "<eos>"]
GEMMA = (
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
# ends a whole conversation with eos too, as Phi-3's does
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<eos>' }}{% endif %}"
)
# nothing ends a turn but the next one's beginning, as in GLM-4's
GLM = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|model|>' }}{{ '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|model|>' }}{% endif %}"
)
# writes an empty think block before the last answer, and text before the token that ends it
HYBRID = (
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + ' .<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}{{ '<start_of_turn>' + m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}{{ 'analysis\n' + m.thinking + '<|end|><start_of_turn>assistant' }}{% endif %}"
    "{{ 'final\n' }}{% else %}{{ '\n' }}{% endif %}{{ m.content + '<end_of_turn>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant' }}{% endif %}"
)


def tokenizer(template: str, ends: tuple[int, ...] = ()) -> Any:
    found = toy.tiny_tokenizer()
    found.add_special_tokens({"additional_special_tokens": MARKS, "eos_token": "<eos>"})
    found.chat_template = template
    setattr(found, turn_format.ENDS, ends)
    return found


def whole(found: Any, answer: str, **more: str) -> str:
    turns = [*chat.messages({"question": "Why?"}, "Be brief."), {"role": "assistant", "content": answer, **more}]
    return str(found.apply_chat_template(turns, tokenize=False))


class Format(unittest.TestCase):
    def test_prompt_and_answer_are_the_conversation_up_to_where_generation_stops(self) -> None:
        glm = tokenizer(GLM)
        user = glm.convert_tokens_to_ids("<|user|>")
        for found, end in (
            (tokenizer(GEMMA), "<end_of_turn>"),
            (tokenizer(PHI), "<|end|>"),
            (tokenizer(GLM, (user,)), "<|user|>"),
            (tokenizer(HYBRID), " .<end_of_turn>"),
            (tokenizer(CHANNELS), "<end_of_turn>"),
        ):
            with self.subTest(end=end):
                prompt = chat.prompt_ids(found, {"question": "Why?"}, "Be brief.")
                answer = chat.answer_ids(found, "So it is")
                rendered = whole(found, "So it is")
                written = found.decode([*prompt, *answer])
                self.assertTrue(written.endswith(f"So it is{end}"), written)
                if end != "<|user|>":
                    self.assertTrue(rendered.startswith(written), (rendered, written))
                self.assertEqual(answer[-len(turn_format.end_of_turn(found)) :], turn_format.end_of_turn(found))

    def test_without_any_token_that_ends_a_turn_eos_does(self) -> None:
        text = tokenizer("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
        self.assertEqual(turn_format.end_of_turn(text), [text.eos_token_id])
        self.assertEqual(
            turn_format.end_of_turn(tokenizer(GLM)), [text.eos_token_id], "nobody says that <|user|> stops it"
        )
        refusing = tokenizer("{{ raise_exception('no') }}")
        self.assertEqual(turn_format.of(refusing).end, (refusing.eos_token_id,))

    def test_labels_of_the_thinking_toy_did_not_change(self) -> None:
        thinking = toy.tiny_tokenizer()
        self.assertEqual(
            (turn_format.end_of_turn(thinking), turn_format.deciding(thinking)), ([thinking.eos_token_id], {})
        )
        self.assertEqual(
            turn_format.deciding(tokenizer(GEMMA))["turn"], {"end": turn_format.end_of_turn(tokenizer(GEMMA))}
        )

    def test_reasoning_is_rendered_where_the_template_has_a_place_and_refused_elsewhere(self) -> None:
        examples = [{"id": "q1", "question": "Why?", "answers": ["So it is"], "reasoning": "count <|end|> bolts"}]
        for template, middle in (
            (HYBRID, "<think>\ncount <|end|> bolts\n</think>\n\n"),
            (CHANNELS, "analysis\ncount <|end|> bolts<|end|><start_of_turn>assistantfinal\n"),
        ):
            found = tokenizer(template)
            (pair,), _ = tokenise_pairs(examples, found, "Be brief.", 400)
            said = list(pair.ids[-pair.num_answer_tokens :])
            self.assertTrue(found.decode(said).startswith(f"{middle}So it is"), found.decode(said))
            marked = found.convert_tokens_to_ids("<|end|>")
            self.assertEqual(said.count(marked), int(template is CHANNELS), "a person's <|end|> is text")
            self.assertEqual(chat.answer_opening(found, "count <|end|> bolts"), middle)
        self.assertIn("analysis\nR<|end|>", whole(found, "A", thinking="R"))
        for template in (GEMMA, PHI, GLM):
            with self.assertRaisesRegex(DataError, "1 pairs carry reasoning that the chat template .* no place for"):
                tokenise_pairs(examples, tokenizer(template), "Be brief.", 400)

    def test_what_a_tokenizer_is_loaded_with_has_the_models_own_ends(self) -> None:
        directory = temporary_directory()
        found = tokenizer(GLM)
        found.save_pretrained(directory)
        user = found.convert_tokens_to_ids("<|user|>")
        for named, expected in (([1, user], [user]), (user, [user]), (None, [found.eos_token_id])):
            (directory / "generation_config.json").write_text(
                f'{{"eos_token_id": {str(named).replace("None", "null")}}}'
            )
            self.assertEqual(turn_format.end_of_turn(chat.load_tokenizer(directory)), expected)
        (directory / "config.json").write_text(json.dumps({"eos_token_id": [1, user]}))
        self.assertEqual(turn_format.end_of_turn(chat.load_tokenizer(directory)), [found.eos_token_id])
        (directory / "generation_config.json").unlink()  # transformers then goes by config.json
        self.assertEqual(turn_format.end_of_turn(chat.load_tokenizer(directory)), [user])


class Scored(unittest.TestCase):
    def test_an_end_of_several_tokens_is_no_part_of_the_answers_nll(self) -> None:
        found = tokenizer(HYBRID)
        example = {
            "id": "q",
            "document": "d",
            "question": "Why?",
            "answers": ["So it is"],
            "choices": ["So it is", "No"],
        }
        (item,), _ = scoring.questions([example], found, "", 400)
        self.assertEqual((item.end_tokens, item.skip), (len(turn_format.end_of_turn(found)), chat.answer_offset(found)))
        self.assertGreater(item.end_tokens, 1)
        torch.manual_seed(0)
        model, _ = toy.tiny_llama()
        model.resize_token_embeddings(len(found))
        (score,) = scoring.score_questions(
            model.eval().requires_grad_(False),
            [item],
            batch_tokens=400,
            pad_id=2,
            device=torch.device("cpu"),
            what="item",
        )
        said = len(chat.text_ids(found, ["So it is"])[0])
        self.assertEqual((score.answer_tokens, score.choice_tokens[0]), (said, said))


def saying(found: Any, chain: list[int], named: Any) -> Any:
    """A model in which each token of `chain` is followed by the next one; `named` are the ends that it ships with."""
    count = len(found)
    shape = {"hidden_size": count, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=count, num_hidden_layers=1, **shape))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(count))
        for silent in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj, model.lm_head):
            silent.weight.zero_()
        for one, following in itertools.pairwise(chain):
            model.lm_head.weight[following, one] = 1.0
    model.generation_config.eos_token_id = named
    return model.eval().requires_grad_(False)


class Stops(unittest.TestCase):
    def test_a_model_that_learnt_another_end_than_eos_says_its_answer_and_no_more(self) -> None:
        """By `generate` itself, as inference and evaluate call it."""
        example = {"id": "q", "document": "d", "question": "Oak?", "answers": ["a tree"]}
        for template, end, named in (
            (GEMMA, "<end_of_turn>", [5, 6]),
            (GEMMA, "<end_of_turn>", None),  # by the template alone
            (GLM, "<|user|>", "its id"),  # by the model's configuration alone
            (GLM, "<|user|>", ["its id", 5]),
        ):
            found = tokenizer(template)
            stop = found.convert_tokens_to_ids(end)
            ids = [stop if one == "its id" else one for one in (named if isinstance(named, list) else [named])]
            last = chat.prompt_ids(found, example, "")[-1]
            tree, more = (found(text, add_special_tokens=False)["input_ids"] for text in ("a tree", " zone"))
            chain = [last, *tree, stop, *more, 7]
            self.assertEqual(len(set(chain)), len(chain))
            model = saying(found, chain, ids if isinstance(named, list) else ids[0])
            with self.subTest(template, named=named), logger.quiet_transformers():
                with unittest.mock.patch.object(model, "generate", wraps=model.generate) as generate:
                    (given,) = scoring.answered(model, found, [example], "", 30, what="answers")
                said = {key: given[key] for key in ("text", "ended", "tokens", "exact_match", "f1")}
                whole_answer = {"text": "a tree", "ended": True, "exact_match": 1.0, "f1": 1.0}
                self.assertEqual(said, {**whole_answer, "tokens": len(tree) + 1})
                self.assertIn(stop, generate.call_args.kwargs["eos_token_id"], "it was cut off, not stopped")

    def test_generation_stops_at_the_templates_end_and_at_every_end_of_the_model(self) -> None:
        found = tokenizer(GEMMA)
        end, other = (found.convert_tokens_to_ids(t) for t in ("<end_of_turn>", "<|end|>"))
        word = found("valve", add_special_tokens=False)["input_ids"]
        for stop, named in ((end, None), (other, [other, 3]), (found.eos_token_id, 5)):
            rows = torch.tensor([[0, *word, stop, *word, end]])
            model = SimpleNamespace(
                parameters=lambda: iter([torch.zeros(1)]),
                forward=lambda input_ids, attention_mask: None,
                generation_config=SimpleNamespace(eos_token_id=named),
                generate=lambda input_ids, eos_token_id, rows=rows, **_: rows[:, input_ids.shape[1] - 1 :],
            )
            with logger.quiet_transformers(), unittest.mock.patch.object(generation, "autocast") as cast:
                cast.return_value.__enter__.return_value = None
                (given,) = generation.answer(model, found, [[0]], max_new_tokens=9)
            self.assertEqual((given.text, given.ended, given.tokens), ("valve", True, len(word) + 1))
            wanted = {end, found.eos_token_id, *(named if isinstance(named, list) else [named] if named else [])}
            self.assertEqual(set(stop_tokens.of(found, model.generation_config)), wanted)


if __name__ == "__main__":
    unittest.main()
