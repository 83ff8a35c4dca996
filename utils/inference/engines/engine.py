"""One server of answers: start or attach, load(adapter), ask(ids), stop.

Nothing is started before the first question, so a command whose answers are all on disk starts nothing. Whoever is
attached to is checked: the base model's root, how long a prompt may be, and of each adapter its parent and that it
changes an answer.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import openai

from config import BaseModelSection, InferenceSection
from utils.adapters import adapter_files
from utils.adapters.factors import Factors, of_one_rank
from utils.exceptions import EngineError, Problem
from utils.inference.engines import server_checks, server_process, vllm_command
from utils.inference.engines.endpoint import Endpoint, Sampling
from utils.inference.engines.server_process import ServerProcess
from utils.inference.engines.vllm_command import EngineNeeds
from utils.logger import event
from utils.models.base_model import BaseModel
from utils.progress import SECONDS_BETWEEN_LINES

KEY = "VLLM_API_KEY"
# how long a server may take until it answers: 460 GB are read from a slow disk
START_SECONDS, LOOK_SECONDS = 3600.0, 0.25
# requests that are open at once; the server makes its own batches of them
AT_ONCE = 64
PORT_TRIES = 3


class Engine:
    """Use it in `with`: it is stopped on the way out, whatever happens."""

    def __init__(
        self,
        base: BaseModel,
        section: BaseModelSection,
        settings: InferenceSection,
        needs: EngineNeeds,
        models_dir: Path,
    ):
        """Raises EngineError where it cannot be started for a reason that is known now."""
        self._base, self._section, self._settings = base, section, settings
        self._needs, self._models_dir = needs, models_dir
        self._process: ServerProcess | None = None
        self._endpoint: Endpoint | None = None
        self._base_name = ""
        self._loaded: dict[str, str] = {}
        self._resources = ExitStack()
        if settings.engine == "vllm":
            self._python = vllm_command.python_of(settings.engine_python)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    def start(self) -> Endpoint:
        """The server, started or attached to and checked; once. Raises EngineError."""
        if self._endpoint is None:
            self._home = self._resources.enter_context(server_process.folder(self._models_dir))
            server = self._started() if self._settings.engine == "vllm" else self._attached()
            self._base_name = server_checks.checked_base(
                server, self._base, self._needs, is_ours=self._process is not None
            )
            self._endpoint = server
        return self._endpoint

    def load(self, name: str, factors: Factors, probe: Sequence[int]) -> str:
        """Load an adapter under this name; returns what requests call it. Raises EngineError.

        `probe` is a prompt (token ids) whose answer the adapter has to change.
        """
        if name not in self._loaded:
            server = self.start()
            served = f"{name}-{secrets.token_hex(4)}"  # another session's adapter of this name is another one
            directory = self._written(served, factors)
            server.load(served, directory, max(f.rank for f in factors.values()))
            server_checks.check_adapter(server, served, self._base_name, probe)
            self._loaded[name] = served
        return self._loaded[name]

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Callable[[int], Sampling],
        adapter: str = "",
        answered: Callable[[int, list[int]], None] = lambda number, ids: None,
    ) -> list[list[int]]:
        """The generated token ids for each prompt (token ids), many at once; `adapter` as `load` returned it.

        `sampling` gives each prompt's, `answered` gets each answer as it comes. Raises EngineError at the first request
        that cannot be answered; answers that came before were handed over.
        """
        server = self.start()
        return asyncio.run(self._ask_all(server, prompts, sampling, adapter or self._base_name, answered))

    def stream(self, prompt: Sequence[int], sampling: Sampling, adapter: str = "") -> Iterator[list[int]]:
        """The generated token ids of one answer, in pieces as they come. Raises EngineError."""
        server = self.start()
        pieces = self._pieces(server, prompt, sampling, adapter or self._base_name)

        async def following() -> list[int] | None:
            return await anext(pieces, None)

        with asyncio.Runner() as runner:
            try:
                while (piece := runner.run(following())) is not None:
                    yield piece
            finally:
                runner.run(pieces.aclose())

    def stop(self) -> None:
        """End a server of ours and remove its folder; one that was attached to is left as it is."""
        try:
            if self._process is not None:
                self._process.stop()
            elif self._endpoint is not None:
                for served in self._loaded.values():
                    with suppress(EngineError):  # it may be gone
                        self._endpoint.unload(served)
        finally:
            self._process = self._endpoint = None
            self._loaded = {}
            self._resources.close()

    # ------------------------------------------------------------------------------------------ start, attach

    def _started(self) -> Endpoint:
        key, last_output = secrets.token_hex(16), ""
        for _ in range(PORT_TRIES):
            port = server_process.free_port()
            words = vllm_command.words(self._python, self._base, self._section, self._needs, port)
            event("starting vLLM", model=self._base.directory, port=port)
            self._process = ServerProcess(words, vllm_command.environment(key), port, self._home)
            if self._waited(Endpoint(self._process.address, key)):
                event("vLLM is ready", port=port)
                return Endpoint(self._process.address, key, self._why_gone)
            last_output = self._process.last_output()
            self._process.stop()
            if "address already in use" not in last_output.lower():
                break
        what = f"the server ended before it answered. It said last:\n{last_output}"
        raise EngineError(Problem(what, fix="see its own words above; --inference.engine local answers without it"))

    def _waited(self, server: Endpoint) -> bool:
        """Whether it became ready; False when it ended."""
        assert self._process is not None
        began = last = time.monotonic()
        while self._process.is_running:
            if server.is_ready():
                return True
            now = time.monotonic()
            if now - last >= SECONDS_BETWEEN_LINES:
                last = now
                event("waiting for vLLM to load the model", seconds=round(now - began))
            if now - began > START_SECONDS:
                self._process.stop()
                raise EngineError(Problem(f"the server was not ready in {START_SECONDS:g} s", server.url))
            time.sleep(LOOK_SECONDS)
        return False

    def _attached(self) -> Endpoint:
        url = self._settings.engine_url
        event("asking a running server", url=url)
        return Endpoint(url, os.environ.get(KEY, ""))

    def _why_gone(self) -> str:
        if self._process is None or self._process.is_running:
            return ""
        return f"the server ended while it was asked. It said last:\n{self._process.last_output()}\n     "

    # ------------------------------------------------------------------------------------------ adapters

    def _written(self, name: str, factors: Factors) -> Path:
        """The adapter as the server reads it: one rank, one scale, and experts one by one."""
        directory = self._home / "adapters" / name
        has_experts = any(f.is_experts for f in factors.values())
        if not (has_experts and adapter_files.save_per_expert(directory, factors, self._base)):
            adapter_files.save(directory, of_one_rank(factors), self._base)
        return directory.resolve()

    # ------------------------------------------------------------------------------------------ questions

    async def _ask_all(
        self,
        server: Endpoint,
        prompts: Sequence[Sequence[int]],
        sampling: Callable[[int], Sampling],
        model: str,
        answered: Callable[[int, list[int]], None],
    ) -> list[list[int]]:
        answers: dict[int, list[int]] = {}
        waiting = iter(range(len(prompts)))

        async def worker(client: openai.AsyncOpenAI) -> None:
            for number in waiting:
                choice = await server.complete(client, model, prompts[number], sampling(number))
                answers[number] = list(choice.model_extra["token_ids"])
                answered(number, answers[number])

        async with server.asynchronous() as client:
            tasks = [asyncio.ensure_future(worker(client)) for _ in range(min(AT_ONCE, len(prompts)))]
            try:
                await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise
        return [answers[number] for number in range(len(prompts))]

    async def _pieces(
        self, server: Endpoint, prompt: Sequence[int], sampling: Sampling, model: str
    ) -> AsyncGenerator[list[int]]:
        async with server.asynchronous() as client:
            async for piece in server.stream(client, model, prompt, sampling):
                yield piece
