"""What works on a base model: every stage tried on it or on some of its layers, in float32, with adapters of one step.

Reads the model, writes into a temporary directory that goes away. Each stage is compared with the model's own forward
pass over one text, so what is said here holds for this model and not for its name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from config import Config
from utils.adapters import inference_layers, peft_model
from utils.adapters.factors import Factors, zero_modules
from utils.composition import composed_adapter
from utils.composition.methods import Recipe, compose
from utils.exceptions import ArtefactError, PipelineError, Problem, VerificationError
from utils.export import merge, merge_check, merge_plan
from utils.inference import generation, scoring
from utils.models import chat, float32_model, loading
from utils.models.base_model import BaseModel
from utils.models.losses import NextTokenLoss
from utils.models.rows import row_probe, row_support
from utils.models.structure import linear_modules, model_class
from utils.models.weights import layer_sample
from utils.models.weights.safetensors_io import Checkpoint
from utils.planning import base_checks

COLUMNS = ("domain training", "task training", "compose", "two active", "streamed merge", "inference", "evaluate")
# layers of a large model that are tried: those between the first and the last are rarely of another kind
MOST_LAYERS = 4
# nats of one text, between our loss and the model's own
SAME_NATS = 1e-3
PROMPT = {"id": "x", "document": "x", "question": "What does it do?", "history": [], "answers": ["It counts."]}
CHOICES = ["It counts.", "It writes one line.", "Nothing"]


def row(config: Config, base: BaseModel) -> dict[str, str]:
    """Column -> what was found there: works, with a number, or refused or failed with the reason."""
    try:
        chat.load_tokenizer(base.directory)
        base_checks.check(config, base, ("domain", "task"))
        base_checks.measured_rows(config, base, ("domain", "task"))
    except ArtefactError as error:
        problem = error.problems[0]
        return dict.fromkeys(COLUMNS, f"refused: {problem.what} -> {problem.fix}")
    with tempfile.TemporaryDirectory() as scratch:
        tried = _Tried(config, base, Path(scratch))
        return {column: _outcome(check) for column, check in zip(COLUMNS, tried.checks(), strict=True)}


def _outcome(check: Callable[[], str]) -> str:
    try:
        return f"works: {check()}"
    except PipelineError as error:
        return f"fails: {error.problems[0].what}"
    except Exception as error:  # noqa: BLE001  whatever a model's own code raises is an answer here
        return f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class _Tried:
    """The stages in their order, each with what the ones before it made."""

    def __init__(self, config: Config, base: BaseModel, scratch: Path):
        self.config, self.scratch, self.parts = config, scratch, list[Factors]()
        self.tokenizer = chat.load_tokenizer(base.directory)
        checkpoint = Checkpoint(base.directory)
        names = linear_modules.named(model_class.outline(base.directory), config.domain.lora.target_modules)
        fitting = layer_sample.choose(checkpoint, names, float32_model.available())
        step = max(1, len(fitting) // MOST_LAYERS)
        layers = sorted({*fitting[::step][: MOST_LAYERS - 1], fitting[-1]})
        if len(layers) < layer_sample.layer_count(checkpoint):
            layer_sample.write(checkpoint, layers, scratch / "base")
            base = replace(base, directory=scratch / "base")
        self.base = replace(base, cache=None) if base.directory.parent == scratch else base
        self.section = config.base.model_copy(
            update={"source": str(base.directory), "revision": "", "dtype": "float32"}
        )
        self.support = row_probe.measured(self.base, self.section)

    def checks(self) -> list[Callable[[], str]]:
        """In the order of COLUMNS."""
        return [
            lambda: self._train("domain"),
            lambda: self._train("task"),
            self._compose,
            self._two_active,
            self._merge,
            self._answer,
            self._score,
        ]

    def _model(self) -> Any:
        model = loading.load_model(self.base, self.section, dtype=torch.float32)
        row_support.attach(model, self.support)
        return model

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor([chat.document_ids(self.tokenizer, [text])[0][:64]])

    def _train(self, stage: str) -> str:
        """One step on one text: our loss is the model's own, and it reaches every module."""
        model, lora = self._model(), getattr(self.config, stage).lora
        if self.parts:
            model = peft_model.add(model, "domain", self.parts[0])
        torch.manual_seed(len(self.parts))
        model = peft_model.attach(model, stage, lora)
        active = [*(["domain"] if self.parts else []), stage]
        peft_model.activate(model, active, trainable=stage)
        ids_1T = self._ids(Path(__file__).read_text(encoding="utf-8"))
        labels_1T = torch.cat([ids_1T[:, 1:], torch.full((1, 1), -100)], dim=1)
        positions_1T = torch.arange(ids_1T.shape[1])[None]
        loss = NextTokenLoss(model)(ids_1T, positions_1T, labels_1T)
        loss.backward()
        own = F.cross_entropy(
            model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float(), ids_1T[0, 1:], reduction="sum"
        )
        difference = abs(float(loss - own))
        if not difference <= SAME_NATS:
            raise VerificationError(Problem("the loss is not the model's own", difference))
        with torch.no_grad():
            for name, parameter in peft_model.trainable_parameters(model).items():
                if "lora_B" in name and parameter.grad is not None and parameter.grad.any():
                    parameter.sub_(0.05 * parameter.grad / parameter.grad.abs().max())
        factors = peft_model.factors_of(model, stage)
        if still := zero_modules(factors):
            raise VerificationError(Problem("no gradient reaches modules that are adapted", still[:3]))
        self.parts.append(factors)
        names = ", ".join(linear_modules.leaves(factors))
        rows = f"rows share by {self.support.packing}" if self.support.packs else "one document in each row"
        return f"loss off by {difference:.0e} nats, {rows}, {len(factors)} modules ({names})"

    def _compose(self) -> str:
        self.composed = compose(self.parts, Recipe())
        ids_BT = float32_model.probe(Checkpoint(self.base.directory))
        model = float32_model.in_float32(self.base, self.section)
        self.differences = composed_adapter.check_logits(self.parts, self.composed, model, ids_BT, exact=True)
        return f"{len(self.composed)} modules, effect {self.differences['composed_to_base']:.0e} of the largest logit"

    def _two_active(self) -> str:
        return f"both active = composed to {self.differences['parts_active_to_composed']:.0e}"

    def _merge(self) -> str:
        target = self.scratch / "merged"
        target.mkdir()
        merge.write(merge_plan.plan(self.base, self.composed, "base"), target, "")
        checks = merge_check.merged_equals_composed(self.base, self.composed, target, self.section)
        return f"reloaded in a fresh process, logits differ by {checks['max_logit_difference_to_rounded']:.0e}"

    @torch.no_grad()
    def _answer(self) -> str:
        model = inference_layers.attach(self._model(), {"composed": self.composed})
        prompt = chat.prompt_ids(self.tokenizer, PROMPT, self.config.task.system_prompt)
        (given,) = generation.answer(model, self.tokenizer, [prompt], max_new_tokens=4)
        ids = list(prompt)
        for _ in range(given.tokens):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        (again,) = [self.tokenizer.decode(chat.shown_ids(self.tokenizer, ids[len(prompt) :]))]
        if again.split() != given.text.split():
            raise VerificationError(Problem("what is generated is not the likeliest next tokens", given.text))
        return f"{given.tokens} tokens are the likeliest ones"

    @torch.no_grad()
    def _score(self) -> str:
        model = inference_layers.attach(self._model(), {"composed": self.composed})
        example = {**PROMPT, "choices": CHOICES, "answer_index": 0}
        items, _ = scoring.questions([example], self.tokenizer, self.config.task.system_prompt, 4096)
        device, pad = next(model.parameters()).device, chat.pad_id(self.tokenizer)
        (score,) = scoring.score_questions(
            model, items, batch_tokens=4096, pad_id=pad, device=device, what="trying evaluate"
        )
        alone = [_alone(model, items[0].prompt, items[0].candidates[at], items[0].skip) for at in items[0].choice_of]
        difference = max(abs(a - b) for a, b in zip(alone, score.choice_nlls, strict=True))
        if not difference <= SAME_NATS:
            raise VerificationError(Problem("choices are not scored as each of them alone", difference))
        return f"choices scored as each of them alone to {difference:.0e} nats, sharing by {self.support.candidates}"


def _alone(model: Any, prompt: Sequence[int], candidate: Sequence[int], skip: int) -> float:
    """NLL of a candidate's text after the prompt, in a row of its own."""
    ids_1T = torch.tensor([[*prompt, *candidate]])
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float()
    nll_T = F.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="none")
    return float(nll_T[len(prompt) - 1 + skip : -1].double().sum())
