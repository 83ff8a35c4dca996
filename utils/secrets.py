"""Secrets: what an access token or a password looks like, and a text without them.

Tokens come from the environment (HF_TOKEN, WANDB_API_KEY, ...) and never from a setting, because settings are written
into manifests. Everything that is printed, logged or raised passes through `redact`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import urllib.parse
from collections.abc import Mapping

HIDDEN = "<token>"
# variables that hold a secret, by the end of their name; DTA_ ones are settings
_NAMES = re.compile(r"(?!DTA_)\w*(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|_PWD|_PAT|(^|_|API|ACCESS|PRIVATE)KEY)", re.I)
# shorter values are words and numbers, and hiding them would make a text unreadable
_SHORTEST = 8
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:hf|api_org)_[A-Za-z0-9]{20,}"
    r"|sk-(?:(?:proj|svcacct|admin|ant|or|lf)\w*-[\w-]{16,}|[A-Za-z0-9]{20,})"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # a JSON web token
    r")"
    r"|(?<=://)[^/\s'\"<>@:]*:[^/\s'\"<>]+(?=@)"  # user:password@host
    # a name says what follows: a WANDB key is 40 hex digits, as a commit is
    r"|(?i:(?<=api_key)|(?<=api-key)|(?<=apikey)|(?<=token)|(?<=secret)|(?<=password))"
    r"(?P<between>[\"']?\s*[=:]\s*[\"']?)[A-Za-z0-9_+-][A-Za-z0-9_.~+/-]{19,}=*"
    r"|(?<=Bearer )[A-Za-z0-9_.~+/-]{16,}=*"
)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with `<token>` for each secret: values of the environment in any spelling, and known shapes."""
    values = tuple(sorted({v for name, v in environment.items() if len(v) >= _SHORTEST and _NAMES.fullmatch(name)}))
    if values:
        text = _any_of(values).sub(HIDDEN, text)
    return _SHAPES.sub(lambda match: (match["between"] or "") + HIDDEN, text)


def holds_secret(text: str) -> bool:
    return redact(text) != text


@functools.lru_cache(maxsize=8)
def _any_of(values: tuple[str, ...]) -> re.Pattern[str]:
    """Each value as it is, inside JSON, as Python shows it, and inside a URL."""
    spellings = {
        spelling
        for value in values
        for spelling in (
            value,
            json.dumps(value)[1:-1],
            json.dumps(value, ensure_ascii=False)[1:-1],
            repr(value)[1:-1],
            urllib.parse.quote(value, safe=""),
        )
    }
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))))
