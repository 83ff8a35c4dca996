"""What a server of answers is checked for: it serves this base model, long enough prompts, and applies an adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.exceptions import EngineError, Problem
from utils.inference.engines import endpoint
from utils.inference.engines.endpoint import Endpoint, Sampling, ServedEntry
from utils.inference.engines.vllm_command import EngineNeeds
from utils.models.base_model import BaseModel

# nats; a server that leaves an adapter out gives the very same numbers
AN_EFFECT = 1e-4


def checked_base(server: Endpoint, base: BaseModel, needs: EngineNeeds, *, is_ours: bool) -> str:
    """What the server calls this base model. Raises EngineError when it serves another, or too short prompts."""
    listed = server.models()
    entry = next((one for one in listed if not one.parent and _is_root(one, base)), None)
    if entry is None:
        named = ", ".join(one.root or one.name for one in listed if not one.parent) or "nothing"
        fix = (
            f"start one of this base model (--model {base.reference}), under a path that both see, or name its own: "
            "--base.source"
        )
        raise EngineError(
            Problem(f"the server's model is {named}, the base model is {base.directory}", server.root, fix)
        )
    if entry.max_model_len is not None and entry.max_model_len < needs.positions:
        what = f"the longest prompt and its answer take {needs.positions} tokens, the server has {entry.max_model_len}"
        fix = f"start it with --max-model-len {needs.positions}, or lower --inference.max_new_tokens"
        raise EngineError(Problem(what, server.root, "shorten the prompts" if is_ours else fix))
    return entry.name


def check_adapter(server: Endpoint, name: str, base_name: str, probe: Sequence[int]) -> None:
    """The adapter is there, of the base model that the server calls `base_name`, and changes an answer.

    `probe` is a prompt (token ids). Raises EngineError.
    """
    entry = next((one for one in server.models() if one.name == name), None)
    if entry is None:
        what = f"the server took the adapter {name} and does not list it"
        raise EngineError(Problem(what, server.root, "start it again"))
    if entry.parent and entry.parent != base_name:
        what = f"the server applies the adapter {name} to {entry.parent}, not to {base_name}"
        raise EngineError(Problem(what, server.root, "attach to a server of this base model alone"))
    plain, adapted = asyncio.run(_probed(server, (base_name, name), probe))
    if not _differ(plain, adapted):
        what = f"the server's answers are the same with the adapter {name} and without: it is not applied"
        fix = "see what the server said when it loaded it; --inference.engine local applies it"
        raise EngineError(Problem(what, server.root, fix))


async def _probed(server: Endpoint, names: Sequence[str], probe: Sequence[int]) -> list[Any]:
    how, more = Sampling(endpoint.PROBE_TOKENS, ()), {"logprobs": endpoint.PROBE_LOGPROBS}
    async with server.asynchronous() as client:
        return [await server.complete(client, name, probe, how, **more) for name in names]


def _is_root(entry: ServedEntry, base: BaseModel) -> bool:
    """Whether the server loaded these files: this directory, or the hub's under the same name."""
    if not entry.root:
        return False
    return entry.root in (base.source, base.reference) or Path(entry.root).resolve() == base.directory.resolve()


def _differ(one: Any, other: Any) -> bool:
    """Whether two choices of a probe differ: in a token, or in the likelihoods of the likeliest ones."""
    if one.model_extra["token_ids"] != other.model_extra["token_ids"]:
        return True
    pairs = [
        (plain.get(token), value)
        for plain, adapted in zip(_top(one), _top(other), strict=False)
        for token, value in adapted.items()
    ]
    return any(plain is None or abs(plain - value) > AN_EFFECT for plain, value in pairs)


def _top(choice: Any) -> list[dict[str, float]]:
    return list((choice.logprobs.top_logprobs if choice.logprobs else None) or [])
