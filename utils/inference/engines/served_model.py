"""A base model with its adapters behind an engine: prompts in, answers out, as `generation` gives them.

Each answer's token ids are a line of a journal as soon as they are there. What stands there is not asked again, so a
server that dies costs the open requests only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import BaseModelSection, InferenceSection
from utils.adapters import adapter_tokenizer
from utils.adapters.factors import Factors
from utils.artifacts import files
from utils.exceptions import DataError, Problem
from utils.inference import generation, stop_tokens
from utils.inference.answer_journal import AnswerJournal
from utils.inference.engines.endpoint import Sampling
from utils.inference.engines.engine import Engine
from utils.inference.engines.vllm_command import EngineNeeds
from utils.inference.generation import GeneratedAnswer
from utils.logger import event, printable
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.models.structure import model_class
from utils.progress import Progress

# transformers keeps the likeliest 50 tokens where a model's configuration says nothing and answers are sampled
USUAL_TOP_K = 50


class ServedModel:
    """Use it in `with`. Raises EngineError where the server cannot be started, attached to or asked."""

    def __init__(
        self,
        base: BaseModel,
        section: BaseModelSection,
        settings: InferenceSection,
        *,
        models_dir: Path,
        rank: int,
        positions: int = 0,
        seed: int = 0,
        journal: AnswerJournal | None = None,
    ):
        """`rank` is the largest of the adapters that will be asked (0: none), `positions` the longest prompt and answer
        in tokens (0: not known before)."""
        self.tokenizer = adapter_tokenizer.of(base)
        self._settings, self._journal, self._seed = settings, journal, seed
        _refuse_too_long(base, positions)
        self._opened = chat.opens_thinking(self.tokenizer)
        self._usual = _sampling(base, self.tokenizer, settings)
        self._engine = Engine(base, section, settings, EngineNeeds(positions, rank), models_dir)

    def __enter__(self) -> ServedModel:
        return self

    def __exit__(self, *error: Any) -> None:
        self._engine.stop()

    def answers(
        self, prompts: Sequence[Sequence[int]], label: str, factors: Factors | None, what: str
    ) -> list[GeneratedAnswer]:
        """The answer to each prompt (token ids) of the base with these factors; `label` names them in the journal."""
        known = self._journal.known() if self._journal else {}
        keys = [self._key(label, prompt, number) for number, prompt in enumerate(prompts)]
        open_ones = [number for number, key in enumerate(keys) if key not in known]
        if len(open_ones) < len(prompts):
            event(f"{what}: on disk already", answers=len(prompts) - len(open_ones), open=len(open_ones))
        if open_ones:
            with Progress(what, total=len(prompts), unit="answer", done=len(prompts) - len(open_ones)) as bar:
                self._ask(prompts, keys, open_ones, label, factors, known, bar)
        return [self._read(known[key]) for key in keys]

    def stream(
        self, prompt: Sequence[int], label: str, factors: Factors | None, show: Callable[[str], None]
    ) -> GeneratedAnswer:
        """One answer; `show` gets its text as it comes."""
        adapter = self._engine.load(label, factors, prompt) if factors else ""
        ids: list[int] = []
        for text in self._texts(self._engine.stream(prompt, self._sampling_of(0), adapter), ids):
            show(text)
        return self._read(ids)

    def _ask(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[str],
        open_ones: Sequence[int],
        label: str,
        factors: Factors | None,
        known: dict[str, list[int]],
        bar: Progress,
    ) -> None:
        adapter = self._engine.load(label, factors, prompts[open_ones[0]]) if factors else ""

        def answered(at: int, ids: list[int]) -> None:
            known[keys[open_ones[at]]] = ids
            if self._journal:
                self._journal.add(keys[open_ones[at]], ids)
            bar.advance(1)

        chosen = [prompts[number] for number in open_ones]
        self._engine.ask(chosen, lambda at: self._sampling_of(open_ones[at]), adapter, answered)

    def _sampling_of(self, number: int) -> Sampling:
        """Each prompt's own seed, so that what is sampled does not depend on who is asked beside it."""
        if not self._usual.temperature:
            return self._usual
        return replace(self._usual, seed=(self._seed * 1_000_003 + number) % 2**63)

    def _key(self, label: str, prompt: Sequence[int], number: int) -> str:
        return files.fingerprint([label, list(prompt), self._sampling_of(number).body()])

    def _read(self, ids: Sequence[int]) -> GeneratedAnswer:
        return generation.read_answer(self.tokenizer, ids, self._usual.stops, opened=self._opened)

    def _texts(self, pieces: Iterator[list[int]], ids: list[int]) -> Iterator[str]:
        """What the ids so far add to the text; they gather in `ids`. A letter of several tokens waits for its last."""
        shown = ""
        for piece in pieces:
            ids += piece
            kept = chat.shown_ids(self.tokenizer, [i for i in ids if i not in self._usual.stops])
            text = printable(self.tokenizer.decode(kept))
            if text.startswith(shown) and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        if (text := self._read(ids).text).startswith(shown):
            yield text[len(shown) :]


def positions_of(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Tokens of the longest prompt and its answer."""
    return max(map(len, prompts), default=0) + max_new_tokens


def rank_of(adapters: Sequence[Factors | None]) -> int:
    """The largest rank among adapters."""
    return max((f.rank for factors in adapters if factors for f in factors.values()), default=0)


def _refuse_too_long(base: BaseModel, positions: int) -> None:
    """Raises DataError where the model has no positions for a prompt and its answer."""
    if positions and (there := model_class.longest_row(base.directory, positions)) < positions:
        what = f"the longest prompt and its answer take {positions} tokens: the model has {there} positions"
        raise DataError(Problem(what, fix="shorten the prompt, or lower --inference.max_new_tokens"))


def _sampling(base: BaseModel, tokenizer: Any, settings: InferenceSection) -> Sampling:
    """What `generation.answer` has transformers do with these settings and the model's own configuration."""
    own = generation_config(base.directory)
    sampled: Mapping[str, Any] = {}
    if settings.temperature > 0:
        sampled = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": USUAL_TOP_K if own.top_k is None else own.top_k,
            "min_p": own.min_p or 0.0,
        }
    return Sampling(
        settings.max_new_tokens,
        tuple(stop_tokens.of(tokenizer, own)),
        repetition_penalty=own.repetition_penalty or 1.0,
        **sampled,
    )


def generation_config(directory: Path) -> Any:
    """The generation configuration that transformers gives a model which it loads from here."""
    from transformers import AutoConfig, GenerationConfig

    if (directory / chat.GENERATION).is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(
        AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    )
