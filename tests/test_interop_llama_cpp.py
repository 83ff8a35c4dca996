"""The merged model and the composed adapter as GGUF: llama.cpp's converter and runtime answer as transformers does.

make interop-test
"""

from __future__ import annotations

import json
import os
import sys
import unittest
from unittest import mock

import torch

from tests.interop_support import ENVIRONMENTS, program
from tests.support import embedded_models, random_factors, temporary_directory
from tests.test_export_merge import merged
from utils.export import gguf
from utils.models import base_model, chat

QUESTIONS = (
    "What does json.dumps do?",
    "Name three colours.",
    "Who wrote Hamlet?",
    "How is bread made?",
    "Count from one to five.",
    "What is a valve?",
)
NEW_TOKENS = 12


class LlamaCpp(unittest.TestCase):
    def test_greedy_answers_of_a_merged_model(self) -> None:
        from transformers import AutoModelForCausalLM

        python = program("llama_cpp")
        (directory,) = (embedded_models() / "base").glob("smollm2*")
        base = base_model.identify(directory, str(directory), "", None)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        factors = random_factors(model, ("q_proj", "v_proj"), 4, 8.0, seed=1, size=0.05)
        target, _ = merged(base, factors, temporary_directory() / "merged")
        checkout = mock.patch.dict(os.environ, {gguf.CHECKOUT: str(ENVIRONMENTS / "llama_cpp" / "llama.cpp")})
        # what the converter needs is in its own environment
        with checkout, mock.patch.object(sys, "executable", str(python.python)):
            file = gguf.convert(target, "f32")
        tokenizer = chat.load_tokenizer(target)
        prompts = [chat.prompt_ids(tokenizer, {"question": question, "context": None}, "") for question in QUESTIONS]
        said = python.run("-P", "tests/programs/llama_cpp_answers.py", file, NEW_TOKENS, given=json.dumps(prompts))
        found = json.loads(said.strip().splitlines()[-1])
        self.assertEqual(found["template"].strip(), (tokenizer.chat_template or "").strip())
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        equal, changed = 0, 0
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for prompt, answer in zip(prompts, found["answers"], strict=True):
            ids = torch.tensor([prompt])
            ask = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
            own = model.generate(ids, **ask)[0, len(prompt) :].tolist()
            equal += own == answer
            changed += plain.generate(ids, **ask)[0, len(prompt) :].tolist() != own
        self.assertGreaterEqual(equal, len(QUESTIONS) - 1)
        self.assertGreater(changed, 2, "the adapter changes nothing: this would prove nothing about it")


if __name__ == "__main__":
    unittest.main()
