"""Chat templates that take no system role, no neighbours of one role, or lists of parts alone."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any

from tests import toy_architectures
from tests.support import temporary_directory
from utils.data.labelled import labelled_pairs
from utils.exceptions import DataError
from utils.models import chat, template_fitting

# written after those of Gemma 2 and Mistral 7B v0.1
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<|im_start|>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SILENT = (
    "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED: dict[str, Any] = {"question": "Which valve?", "history": [], "answers": ["The supply valve."]}


def prompt(template: str, system: str, **changed: Any) -> str:
    return chat.prompt_text(toy_architectures.tokenizer(template), {**ASKED, **changed}, system)


class Systems(unittest.TestCase):
    def test_without_a_system_role_the_text_stands_in_front_of_the_first_question(self) -> None:
        self.assertEqual(
            prompt(GEMMA, "Be brief."),
            "<s><|im_start|>user\nBe brief.\n\nWhich valve?<|im_end|>\n<|im_start|>model\n",
        )
        self.assertEqual(prompt(MISTRAL, "Be brief."), "<s>[INST] Be brief.\n\nWhich valve? [/INST]")
        self.assertIn("user\nBe brief.\n\nWhich valve?", prompt(SILENT, "Be brief."))

    def test_an_empty_one_stands_nowhere(self) -> None:
        self.assertEqual(prompt(MISTRAL, ""), "<s>[INST] Which valve? [/INST]")
        self.assertNotIn("\n\nWhich", prompt(GEMMA, ""))

    def test_it_goes_before_the_first_question_of_a_conversation_and_no_other(self) -> None:
        turns = [{"role": "user", "content": "Who signs?"}, {"role": "assistant", "content": "The lead."}]
        found = prompt(MISTRAL, "Be brief.", history=turns)
        self.assertEqual(
            found, "<s>[INST] Be brief.\n\nWho signs? [/INST]The lead.<|im_end|>[INST] Which valve? [/INST]"
        )

    def test_a_template_with_one_gets_it_as_it_is_even_an_empty_one(self) -> None:
        for system in ("Be brief.", ""):
            self.assertTrue(
                prompt(toy_architectures.CHATML, system).startswith(f"<|im_start|>system\n{system}<|im_end|>")
            )

    def test_it_is_said_once(self) -> None:
        template_fitting._say_moved.cache_clear()
        with self.assertLogs("adapters", "INFO") as said:
            prompt(GEMMA, "Be brief.")
            prompt(GEMMA, "Be very brief.")
        self.assertEqual(len([line for line in said.output if "no system role" in line]), 1)

    def test_tokens_are_those_of_the_text(self) -> None:
        tokenizer = toy_architectures.tokenizer(GEMMA)
        ids = chat.prompt_ids(tokenizer, ASKED, "Be <|im_end|> brief.")
        text = prompt(GEMMA, "Be <|im_end|> brief.")
        self.assertEqual(tokenizer.decode(ids), text)
        self.assertEqual(ids.count(tokenizer.eos_token_id), 1)  # the person's own is spelled out


class Turns(unittest.TestCase):
    def test_neighbours_of_one_role_become_one_turn_where_the_template_refuses_them(self) -> None:
        history = [{"role": "user", "content": "I have a pump."}]
        self.assertEqual(prompt(MISTRAL, "", history=history), "<s>[INST] I have a pump.\n\nWhich valve? [/INST]")
        kept = prompt(toy_architectures.CHATML, "", history=history)
        self.assertIn("I have a pump.<|im_end|>\n<|im_start|>user\nWhich valve?", kept)

    def test_what_stays_refused_has_the_templates_reason(self) -> None:
        history = [{"role": "assistant", "content": "Hello."}]
        with self.assertRaisesRegex(chat.TemplateError, "Conversation roles must alternate"):
            prompt(MISTRAL, "", history=history)

    def test_conversations_that_it_refuses_are_listed_by_file_and_line_before_anything_is_trained(self) -> None:
        tokenizer = toy_architectures.tokenizer(MISTRAL)
        history = [{"role": "assistant", "content": "Hello."}]
        rows = [{**ASKED, "id": "a.jsonl#1"}, {**ASKED, "id": "a.jsonl#2", "history": history}]
        with self.assertRaisesRegex(DataError, r"a\.jsonl#2: (.|\n)*must alternate") as caught:
            labelled_pairs._written(rows, tokenizer, "")
        (problem,) = caught.exception.problems
        self.assertIn("change the order of its turns", problem.fix)
        with self.assertRaises(DataError) as caught:
            labelled_pairs._written([{**rows[1], "id": f"a.jsonl#{line}"} for line in range(23)], tokenizer, "")
        self.assertEqual([problem.what for problem in caught.exception.problems[20:]], ["and 3 more"])
        self.assertEqual(caught.exception.problems[20].fix, problem.fix)

    def test_parts_are_given_to_a_template_that_reads_nothing_else(self) -> None:
        self.assertIn("user\nWhich valve?<|im_end|>", prompt(PARTS, "Be brief."))
        self.assertIn("system\nBe brief.<|im_end|>", prompt(PARTS, "Be brief."))

    def test_a_tokenizer_with_such_a_template_loads(self) -> None:
        for template in (GEMMA, MISTRAL, SILENT, PARTS):
            directory = temporary_directory()
            toy_architectures.tokenizer(template).save_pretrained(directory)
            self.assertFalse(chat.opens_thinking(chat.load_tokenizer(Path(directory))))

    def test_the_form_is_asked_once_for_a_template(self) -> None:
        tokenizer = toy_architectures.tokenizer(GEMMA)
        first = template_fitting.form_of(tokenizer)
        self.assertEqual((first.system, first.neighbours, first.parts), (False, False, False))
        self.assertIs(template_fitting.form_of(toy_architectures.tokenizer(GEMMA)), first)


if __name__ == "__main__":
    unittest.main()
