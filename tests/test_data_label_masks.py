"""What is trained and what is asked, token by token, with MiniMax-M2's special tokens, their ids and its template.

The tokenizer is built here: every byte is a token, and the special tokens have the ids that they have in MiniMax-M2,
so that what is expected can be written out by hand.
"""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from config import InferenceSection, TrainSection
from tests.support import PLAIN_TEMPLATE, temporary_directory
from utils.data.batches import BucketedPairs, pad
from utils.data.example_formats import RowError, to_common
from utils.data.pair_rows import tokenise_pairs
from utils.exceptions import DataError
from utils.inference import generation, scoring
from utils.models import chat
from utils.models.losses import IGNORED

PAD, ROLE, END, BEGIN, THINK, THOUGHT = 200000, 200019, 200020, 200034, 200050, 200051
SPECIAL = {"]!p~[": PAD, "]~b]": ROLE, "[e~[": END, "]!d~[": 200021, "]~!b[": BEGIN}
MARKS = {"<think>": THINK, "</think>": THOUGHT}
# MiniMax-M2's chat_template.jinja without tools and dates
TEMPLATE = """\
{%- set system_message = none -%}
{%- set conversation = messages -%}
{%- if messages and messages[0].role == "system" -%}
{%- set system_message = messages[0] -%}{%- set conversation = messages[1:] -%}
{%- endif -%}
{%- set ns = namespace(last_user_index=-1) -%}
{%- for m in conversation -%}
{%- if m.role == 'user' -%}{%- set ns.last_user_index = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- ']~!b[' ~ ']~b]system' ~ '\\n' -}}
{%- if system_message and system_message.content -%}{{- system_message.content -}}
{%- else -%}{{- 'You are a helpful assistant.' -}}{%- endif -%}
{{- '[e~[\\n' -}}
{%- for message in conversation -%}
{%- if message.role == 'assistant' -%}
{{- ']~b]ai' ~ '\\n' -}}
{%- set reasoning_content = '' -%}{%- set content = message.content -%}
{%- if message.reasoning_content is string -%}{%- set reasoning_content = message.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set reasoning_content = content.split('</think>')[0].strip('\\n').split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].strip('\\n') -%}
{%- endif -%}
{%- if reasoning_content and loop.index0 > ns.last_user_index -%}
{{- '<think>' ~ '\\n' ~ reasoning_content ~ '\\n' ~ '</think>' ~ '\\n\\n' -}}
{%- endif -%}
{{- content -}}{{- '[e~[' ~ '\\n' -}}
{%- elif message.role == 'user' -%}
{{- ']~b]user' ~ '\\n' -}}{{- message.content -}}{{- '[e~[' ~ '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ']~b]ai' ~ '\\n' ~ '<think>' ~ '\\n' -}}{%- endif -%}"""
# shows what earlier turns thought, as templates do that keep it
KEEPING = TEMPLATE.replace("and loop.index0 > ns.last_user_index", "")
SYSTEM = "Be brief."


def tokenizer(*, marks_are_special: bool = False, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Bytes and MiniMax-M2's special tokens; it names no pad token, as the settings of that model do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | SPECIAL | MARKS
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], fuse_unk=False))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    core.add_tokens([AddedToken(mark, special=marks_are_special, normalized=False) for mark in MARKS])
    names = {"bos_token": "]~!b[", "eos_token": "[e~[", "unk_token": "]!d~["}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, model_max_length=4096, **names)


def said(text: str) -> list[int]:
    """Ids of ASCII text by hand: the alphabet's order is that of the letters that stand for the bytes."""
    order = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [order.index({" ": "\u0120", "\n": "\u010a"}.get(letter, letter)) for letter in text]


def ids(*parts: str | int) -> list[int]:
    return [i for part in parts for i in (said(part) if isinstance(part, str) else [part])]


SYSTEM_TURN = ids(BEGIN, ROLE, "system\nBe brief.", END, "\n")
ASKED = ids(ROLE, "ai\n", THINK, "\n")


def example(**fields: Any) -> dict[str, Any]:
    return {"id": "e", "document": "d", "question": "Why?", "answers": ["So."], **fields}


def trained(row: dict[str, Any], using: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """(input ids, labels) of one example as the training step gets them."""
    pairs, report = tokenise_pairs([row], using, SYSTEM, 4096)
    assert report.usable == 1
    batch = pad(pairs, chat.pad_id(using))
    return batch.input_ids_BT[0].tolist(), batch.labels_BT[0].tolist()


class Masks(unittest.TestCase):
    def setUp(self) -> None:
        self.both = [tokenizer(marks_are_special=special) for special in (False, True)]

    def assert_trained(self, row: dict[str, Any], prompt: Sequence[int], answer: Sequence[int]) -> None:
        for using in self.both:
            found, labels = trained(row, using)
            self.assertEqual(found, [*prompt, *answer])
            # a label is the next token, so the first is at the prompt's last place and the last token has none
            self.assertEqual(labels, [*[IGNORED] * (len(prompt) - 1), *answer, IGNORED])

    def test_single_turn_without_reasoning_closes_the_empty_block_and_trains_the_end_of_turn(self) -> None:
        prompt = [*SYSTEM_TURN, *ids(ROLE, "user\nWhy?", END, "\n"), *ASKED]
        self.assert_trained(example(), prompt, ids("\n", THOUGHT, "\n\nSo.", END))

    def test_single_turn_with_reasoning_trains_reasoning_closing_answer_and_end(self) -> None:
        prompt = [*SYSTEM_TURN, *ids(ROLE, "user\nWhy?", END, "\n"), *ASKED]
        answer = ids("It is.", "\n", THOUGHT, "\n\nSo.", END)
        self.assert_trained(example(reasoning="It is."), prompt, answer)

    def test_several_turns_train_the_last_answer_alone_and_the_template_drops_what_earlier_ones_thought(self) -> None:
        history = [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "I.", "reasoning_content": "Me?"},
        ]
        turns = ids(ROLE, "user\nWho?", END, "\n", ROLE, "ai\nI.", END, "\n", ROLE, "user\nWhy?", END, "\n")
        prompt = [*SYSTEM_TURN, *turns, *ASKED]
        self.assert_trained(example(history=history), prompt, ids("\n", THOUGHT, "\n\nSo.", END))
        reasoned = ids("It is.", "\n", THOUGHT, "\n\nSo.", END)
        self.assert_trained(example(history=history, reasoning="It is."), prompt, reasoned)
        inline = [history[0], {"role": "assistant", "content": "<think>\nMe?\n</think>\n\nI."}]
        self.assert_trained(example(history=inline), prompt, ids("\n", THOUGHT, "\n\nSo.", END))

    def test_a_template_that_keeps_what_earlier_turns_thought_gets_it(self) -> None:
        turns = [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "I.", "reasoning_content": "Me?"},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "<think>\nIt is.\n</think>\n\nSo."},
        ]
        _, fields = to_common({"messages": turns})
        using = tokenizer(template=KEEPING)
        prompt = chat.prompt_ids(using, {"id": "e", **fields}, SYSTEM)
        thought = ids(ROLE, "ai\n", THINK, "\nMe?\n", THOUGHT, "\n\nI.", END, "\n")
        between = [*ids(ROLE, "user\nWho?", END, "\n"), *thought, *ids(ROLE, "user\nWhy?", END, "\n")]
        self.assertEqual(prompt, [*SYSTEM_TURN, *between, *ASKED])

    def test_a_special_token_in_what_an_earlier_turn_thought_is_text(self) -> None:
        turn = {"role": "assistant", "content": "I.", "reasoning_content": "a [e~[ b"}
        using = tokenizer(template=KEEPING)
        found = chat.prompt_ids(using, example(history=[{"role": "user", "content": "Who?"}, turn]), SYSTEM)
        self.assertEqual(found.count(END), 4, "system, question, answer, question")
        self.assertIn("a [e~[ b", using.decode(found))

    def test_prompt_ends_in_an_open_think_block_and_is_no_prefix_of_the_rendered_conversation(self) -> None:
        for using in self.both:
            prompt = chat.prompt_ids(using, example(), SYSTEM)
            self.assertEqual(prompt[-2:], ids(THINK, "\n"))
            turns = [*chat.messages(example(), SYSTEM), {"role": "assistant", "content": "So."}]
            rendered = using(using.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
            self.assertNotEqual(rendered[: len(prompt)], prompt, "the trap that a mask by prefix length falls into")

    def test_a_template_without_think_block_trains_answer_and_end_alone_and_refuses_reasoning(self) -> None:
        using = tokenizer(template=PLAIN_TEMPLATE)
        with self.assertRaisesRegex(DataError, "1 pairs carry reasoning"):
            trained(example(reasoning="It is."), using)
        found, labels = trained(example(), using)
        prompt = ids(ROLE, "system\nBe brief.", END, "\n", ROLE, "user\nWhy?", END, "\n", ROLE, "ai\n")
        answer = ids("So.", END)
        self.assertEqual((found, labels), ([*prompt, *answer], [*[IGNORED] * (len(prompt) - 1), *answer, IGNORED]))

    def test_training_evaluation_and_inference_ask_in_the_same_tokens(self) -> None:
        for using in self.both:
            (pair,), _ = tokenise_pairs([example()], using, SYSTEM, 4096)
            (item,), _ = scoring.questions([example()], using, SYSTEM, 4096)
            self.assertEqual((*item.prompt, *item.candidates[0]), pair.ids)
            self.assertEqual(list(item.candidates[0][: item.skip]), ids("\n", THOUGHT, "\n\n"))
            with mock.patch.object(generation, "answer", return_value=["said"]) as asked:
                generation.answer_all(None, using, [example()], SYSTEM, InferenceSection(max_new_tokens=4))
            self.assertEqual(asked.call_args.args[2], [list(item.prompt)])


class Padding(unittest.TestCase):
    def test_pad_is_the_models_own_token_where_its_settings_name_none(self) -> None:
        directory = temporary_directory()
        tokenizer().save_pretrained(directory)
        (directory / "config.json").write_text('{"model_type": "minimax_m2"}')
        found = chat.load_tokenizer(directory)
        self.assertEqual((chat.pad_id(found), found.eos_token_id), (PAD, END))
        rows = [example(id="short"), example(id="long", answers=["A longer answer."])]
        pairs, _ = tokenise_pairs(rows, found, SYSTEM, 4096)
        data = BucketedPairs(
            pairs, TrainSection(max_sequence_tokens=64, micro_batch_tokens=4096), 0, chat.pad_id(found)
        )
        batch = data.batch(0, (0, 1))
        missing = len(pairs[1].ids) - len(pairs[0].ids)
        self.assertEqual(batch.input_ids_BT[0, -missing:].tolist(), [PAD] * missing)
        self.assertEqual(batch.labels_BT[0, -missing - 1 :].tolist(), [IGNORED] * (missing + 1))

    def test_end_of_turn_is_trained_in_every_row_even_where_the_pad_token_is_the_same(self) -> None:
        using = tokenizer()
        rows = [example(id="short"), example(id="long", answers=["A longer answer."])]
        pairs, _ = tokenise_pairs(rows, using, SYSTEM, 4096)
        for pad_token in (PAD, END):
            batch = pad(pairs, pad_token)
            self.assertEqual((batch.labels_BT == END).sum(dim=1).tolist(), [1, 1])
            self.assertEqual(batch.num_labels, sum(pair.num_answer_tokens for pair in pairs))

    def test_a_document_stands_between_begin_and_end_without_chat_tokens(self) -> None:
        self.assertEqual(chat.document_ids(tokenizer(), ["A text."]), [ids(BEGIN, "A text.", END)])


class Data(unittest.TestCase):
    def test_reasoning_is_found_in_every_form_that_people_and_servers_write_it(self) -> None:
        question = {"role": "user", "content": "Why?"}
        forms = (
            {"question": "Why?", "answer": "So.", "reasoning": "It is."},
            {"question": "Why?", "answer": "So.", "reasoning_content": "It is."},
            {"question": "Why?", "answer": "So.", "reasoning": "<think>\nIt is.\n</think>"},
            {"question": "Why?", "answer": "<think>\nIt is.\n</think>\n\nSo."},
            {"prompt": "Why?", "completion": "It is.\n</think>\n\nSo."},
            {"messages": [question, {"role": "assistant", "content": "So.", "reasoning_content": "It is."}]},
            {"messages": [question, {"role": "assistant", "content": "So.", "reasoning": "It is."}]},
            {"messages": [question, {"role": "assistant", "content": "<think>It is.</think>So."}]},
        )
        for row in forms:
            _, fields = to_common(row)
            self.assertEqual((fields["answers"], fields["reasoning"]), (["So."], "It is."), row)
        self.assertEqual(to_common({"prompt": "Why?", "completion": "\n</think>\n\nSo."})[1]["reasoning"], None)
        self.assertEqual(
            to_common({"prompt": "q", "completion": "the tag </think>"})[1]["answers"], ["the tag </think>"]
        )

    def test_a_think_mark_that_would_end_the_block_early_is_refused(self) -> None:
        for row in (
            {"question": "Why?", "answer": "So.", "reasoning": "a </think> b"},
            {"question": "Why?", "answer": "<think>a</think>b</think>c"},
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": 3}]},
        ):
            with self.assertRaises(RowError, msg=row):
                to_common(row)


class Answers(unittest.TestCase):
    """What a model generated, with a model whose every next token is decided here."""

    def made(self, tokens: Sequence[int], *, special: bool, template: str = TEMPLATE) -> tuple[Any, str, str]:
        """(answer, thoughts as streamed, answer as streamed) of a model that says exactly these tokens."""
        using = tokenizer(marks_are_special=special, template=template)
        thoughts: list[str] = []
        shown: list[str] = []
        parting = generation.ThinkSplitter(thoughts.append, shown.append, opened=chat.opens_thinking(using))
        prompt = chat.prompt_ids(using, example(), SYSTEM)
        (found,) = generation.answer(Saying(tokens), using, [prompt], max_new_tokens=len(tokens), stream=parting)
        parting.end()
        return found, "".join(thoughts), "".join(shown)

    def test_reasoning_is_parted_from_the_answer_and_streamed_apart_even_where_its_marks_are_special(self) -> None:
        for special in (False, True):
            for words in ("It is.", ""):
                tokens = ids(words, "\n", THOUGHT, "\n\nSo it is.", END)
                found, thoughts, shown = self.made(tokens, special=special)
                self.assertEqual((found.answer, found.reasoning, found.ended), ("So it is.", words, True))
                self.assertEqual((thoughts.strip(), shown.strip()), (words, "So it is."))

    def test_what_runs_out_while_thinking_is_no_answer(self) -> None:
        for special in (False, True):
            found, thoughts, shown = self.made(ids("It is so"), special=special)
            self.assertEqual((found.answer, found.reasoning, found.ended), ("", "It is so", False))
            self.assertEqual((thoughts, shown), ("It is so", ""))

    def test_without_a_think_block_everything_is_the_answer(self) -> None:
        found, thoughts, shown = self.made(ids("So it is.", END), special=False, template=PLAIN_TEMPLATE)
        self.assertEqual((found.answer, found.reasoning, thoughts, shown), ("So it is.", "", "", "So it is."))

    def test_a_mark_that_comes_in_pieces_is_found(self) -> None:
        for cut in range(1, len(chat.THINK_END)):
            thoughts: list[str] = []
            shown: list[str] = []
            parting = generation.ThinkSplitter(thoughts.append, shown.append, opened=True)
            for piece in ("a < b", chat.THINK_END[:cut], chat.THINK_END[cut:] + "\n\n", "c </think>"):
                parting(piece)
            parting.end()
            self.assertEqual(("".join(thoughts), "".join(shown)), ("a < b", "c </think>"))

    def test_answers_are_scored_without_their_reasoning(self) -> None:
        using = tokenizer(marks_are_special=True)
        for tokens, right in ((ids("No.\n", THOUGHT, "\n\nSo.", END), 1.0), (ids("So."), 0.0)):
            (row,) = scoring.answered(Saying(tokens), using, [example()], SYSTEM, len(tokens), what="answers")
            self.assertEqual((row["exact_match"], row["f1"]), (right, right))


class Saying(torch.nn.Module):
    """A model that says given tokens, as `generate` would have it: prompt first, one token after the other."""

    def __init__(self, tokens: Sequence[int]):
        super().__init__()
        self.tokens = list(tokens)
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def generate(self, *, input_ids: torch.Tensor, streamer: Any, **_: Any) -> torch.Tensor:
        if streamer is not None:
            streamer.put(input_ids)
            for token in self.tokens:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return torch.cat([input_ids, torch.tensor([self.tokens])], dim=1)


if __name__ == "__main__":
    unittest.main()
