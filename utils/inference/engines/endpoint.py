"""A server's HTTP API as far as answers need it: models, adapters, completions of token ids, and what failures mean.

Everything that decides an answer is sent, because a server applies its own defaults (vLLM: generation_config.json) to
what is left out. Prompts are token ids, and the server gives back the ids that it saw.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai

from utils.exceptions import EngineError, Problem
from utils.logger import redact

# seconds before each further try of a request that a server refused for the moment, or lost
RETRY_SECONDS: tuple[float, ...] = (0.5, 1, 2, 4, 8)
NOTICED_SECONDS = 2.0
READY_SECONDS, CONNECT_SECONDS, CONTROL_SECONDS, ANSWER_SECONDS = 5.0, 5.0, 600.0, 600.0
LOAD, UNLOAD, UPDATING = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
NO_LORA = "lora is not enabled"
# how many of the likeliest tokens a probe compares, and over how many tokens
PROBE_LOGPROBS, PROBE_TOKENS = 5, 4


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen and where it ends; temperature 0 is greedy, top_k 0 takes every token."""

    max_new_tokens: int
    stops: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def body(self) -> dict[str, Any]:
        """The request's fields; what vLLM adds to OpenAI's goes along as it is."""
        more = {"top_k": self.top_k, "min_p": self.min_p, "repetition_penalty": self.repetition_penalty}
        more |= {"stop_token_ids": list(self.stops), "return_token_ids": True, "skip_special_tokens": False}
        return {
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": self.seed,
            "extra_body": {**more, "add_special_tokens": False},
        }


@dataclass(frozen=True)
class ServedEntry:
    """A line of /v1/models: a base model has no parent, `root` is where it was loaded from."""

    name: str
    root: str
    parent: str
    max_model_len: int | None


@dataclass(frozen=True)
class Endpoint:
    """One server. `alive` says why nobody can answer there any more, for a server of ours; empty while it runs."""

    url: str
    key: str = ""
    alive: Callable[[], str] = lambda: ""

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    def is_ready(self) -> bool:
        """Whether it is ready and wants this key and no other; never raises for what it does not say.

        Another server may have taken the port meanwhile, and that one takes any key, or none of ours.
        """
        try:
            with self._client(READY_SECONDS) as client:
                client.get("/health", cast_to=object)
                client.get("/v1/models", cast_to=object)
            with replace(self, key=f"not {self.key}")._client(READY_SECONDS) as client:
                client.get("/v1/models", cast_to=object)
        except openai.AuthenticationError as error:
            return error.request.headers["authorization"] != f"Bearer {self.key}"
        except openai.OpenAIError:
            pass
        return False

    def models(self) -> list[ServedEntry]:
        """What it serves. Raises EngineError."""
        listed = self._control("GET", "/v1/models")
        try:
            return [
                ServedEntry(str(one["id"]), str(one.get("root") or ""), str(one.get("parent") or ""), _length(one))
                for one in listed["data"]
            ]
        except (TypeError, KeyError, AttributeError) as error:
            what = f"{self.root}/v1/models is no list of models"
            raise EngineError(Problem(what, str(listed)[:120], "is this a server of the OpenAI API?")) from error

    def load(self, name: str, path: Path, rank: int) -> None:
        """Load an adapter into the running server. Raises EngineError."""
        self._control("POST", LOAD, {"lora_name": name, "lora_path": str(path)}, adapter=(name, path, rank))

    def unload(self, name: str) -> None:
        """Let the server forget an adapter. Raises EngineError."""
        self._control("POST", UNLOAD, {"lora_name": name})

    async def complete(
        self, client: openai.AsyncOpenAI, model: str, prompt: Sequence[int], sampling: Sampling, **more: Any
    ) -> Any:
        """One completion's choice, tried again while the server cannot answer for the moment. Raises EngineError."""
        for number, pause in enumerate([*RETRY_SECONDS, None]):
            try:
                completion = await client.completions.create(
                    model=model, prompt=list(prompt), **sampling.body(), **more
                )
                return _checked(completion, prompt, self.root)
            except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
                # one that was silent for so long is not asked the same again
                if pause is None or isinstance(error, openai.APITimeoutError) or self.alive():
                    raise self._failure(error, f"asked {number + 1} times", model=model) from error
                await asyncio.sleep(pause)
            except (openai.OpenAIError, ValueError) as error:
                raise self._failure(error, "asked for an answer", model=model) from error
        raise AssertionError("the last try raises")

    async def stream(
        self, client: openai.AsyncOpenAI, model: str, prompt: Sequence[int], sampling: Sampling
    ) -> AsyncIterator[list[int]]:
        """The token ids of one answer as they come. Raises EngineError."""
        try:
            pieces = await client.completions.create(model=model, prompt=list(prompt), stream=True, **sampling.body())
            is_first = True
            async for piece in pieces:
                for choice in piece.choices:
                    extra = choice.model_extra or {}
                    if is_first:
                        _refuse_other_prompt(extra, prompt, self.root)
                    is_first = False
                    yield list(extra.get("token_ids") or [])
        except (openai.OpenAIError, ValueError) as error:
            raise self._failure(error, "asked for an answer", model=model) from error

    def asynchronous(self) -> openai.AsyncOpenAI:
        """A client for many requests at once; close it."""
        return openai.AsyncOpenAI(
            api_key=self.key or "none",
            base_url=f"{self.root}/v1",
            timeout=openai.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not self._is_here),
        )

    @property
    def _is_here(self) -> bool:
        """On this machine: no proxy of the environment may stand between."""
        return self.root.partition("//")[2].rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")

    def _client(self, seconds: float) -> openai.OpenAI:
        return openai.OpenAI(
            api_key=self.key or "none",
            base_url=self.root,
            timeout=openai.Timeout(seconds, connect=CONNECT_SECONDS),
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=not self._is_here),
        )

    def _control(self, method: str, path: str, body: Any = None, adapter: tuple[str, Path, int] | None = None) -> Any:
        try:
            with self._client(CONTROL_SECONDS) as client:
                if method == "GET":
                    return client.get(path, cast_to=object)
                return client.post(path, body=body, cast_to=object)
        except (openai.OpenAIError, ValueError) as error:
            raise self._failure(error, f"{method} {path}", adapter=adapter) from error

    def _failure(
        self, error: Exception, what: str, model: str = "", adapter: tuple[str, Path, int] | None = None
    ) -> EngineError:
        """What a failure means, and what to do: a missing route, a missing adapter, LoRA switched off, a lost
        connection, and the rest."""
        message = _message(error)
        gone, waited = self.alive(), 0.0
        # a connection is lost before the process that watches the server has seen its end
        while not gone and isinstance(error, openai.APIConnectionError) and waited < NOTICED_SECONDS:
            time.sleep(0.05)
            gone, waited = self.alive(), waited + 0.05
        if gone:
            return EngineError(Problem(gone, self.root, "run the same command again"))
        if isinstance(error, openai.APITimeoutError):
            seconds = ANSWER_SECONDS if model else CONTROL_SECONDS
            return EngineError(Problem(f"the server gave no answer in {seconds:g} s ({what})", self.root, _SEE))
        if isinstance(error, openai.APIConnectionError):
            reason = str(error.__cause__ or error)
            return EngineError(Problem(f"the connection to the server was lost ({what}): {reason}", self.root, _SEE))
        if NO_LORA in message.lower():
            return EngineError(Problem("LoRA is switched off in this server", self.root, _start(adapter)))
        if isinstance(error, openai.NotFoundError):
            return self._not_found(message, what, model, adapter)
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            fix = "put its key into VLLM_API_KEY of the environment"
            return EngineError(Problem("the server wants another key", self.root, fix))
        status = f"HTTP {error.status_code}" if isinstance(error, openai.APIStatusError) else type(error).__name__
        return EngineError(Problem(f"the server refuses ({what}): {status}: {message}", self.root, _SEE))

    def _not_found(self, message: str, what: str, model: str, adapter: tuple[str, Path, int] | None) -> EngineError:
        if model:
            fix = "run the same command again, which loads it anew; what is answered is kept"
            return EngineError(
                Problem(f"the server has no model or adapter {model} (any more): {message}", self.root, fix)
            )
        if adapter and message:
            fix = "give the server a file system that it shares with this command"
            what = f"the server finds no adapter in {adapter[1]}: {message}"
            return EngineError(Problem(what, self.root, fix))
        if adapter:
            return EngineError(Problem(f"the server has no {LOAD}", self.root, _start(adapter)))
        return EngineError(Problem(f"the server has no {what}", self.root, "is this a server of the OpenAI API?"))


_SEE = "see what the server says; start it again where it ended; run the same command again"


def _start(adapter: tuple[str, Path, int] | None) -> str:
    """How a server takes adapters while it runs, and how it takes one when it starts."""
    rank = adapter[2] if adapter else "RANK"
    return f"start it with {UPDATING} in its environment and --enable-lora --max-lora-rank {rank}"


def _message(error: Exception) -> str:
    """What the server itself said about an error; empty where its framework did (an unknown path)."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        body = body.get("message") or ""
        return redact(" ".join(str(body).split()))[:300]
    return "" if isinstance(error, openai.NotFoundError) else redact(" ".join(str(error).split()))[:300]


def _length(entry: dict[str, Any]) -> int | None:
    length = entry.get("max_model_len")
    return length if isinstance(length, int) else None


def _checked(completion: Any, prompt: Sequence[int], server: str) -> Any:
    """The choice of a completion, its `token_ids` with it. Raises EngineError for one of another prompt."""
    if not getattr(completion, "choices", None):
        raise EngineError(Problem("the server gave an answer without choices", server, _SEE))
    choice = completion.choices[0]
    extra = choice.model_extra or {}
    _refuse_other_prompt(extra, prompt, server)
    return choice


def _refuse_other_prompt(extra: dict[str, Any], prompt: Sequence[int], server: str) -> None:
    ids, seen = extra.get("token_ids"), extra.get("prompt_token_ids")
    if not isinstance(ids, list) or not isinstance(seen, list):
        what = "the server does not give back token ids (return_token_ids), so its prompt cannot be compared"
        raise EngineError(Problem(what, server, "take vLLM 0.10.2 or newer"))
    if seen != list(prompt):
        at = next(
            (i for i, (a, b) in enumerate(zip(seen, prompt, strict=False)) if a != b), min(len(seen), len(prompt))
        )
        what = f"the server answered another prompt than it was given: {len(seen)} token ids, unlike from number {at}"
        raise EngineError(Problem(what, server, "take a server that leaves token ids as they are"))
