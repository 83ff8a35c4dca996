"""The settings of runs side by side: which differ, and in which a run is not like most of its stage."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from utils.artifacts.run_list import Entry

# letters of a value
WIDEST = 44
# shown as its first letters, which name it well enough
DIGEST = re.compile("[0-9a-f]{64}")
# recorded in an identity, and said in columns of their own or of no use to a reader
_NOT_SHOWN = ("stage", "method", "base", "data", "tokenizer", "adapters", "runs", "domain_adapter", "models")


def unusual(alike: Sequence[Entry]) -> list[str]:
    """For each run the settings in which it is not like more than half of them; what is empty is left out."""
    own: list[list[str]] = [[] for _ in alike]
    for name, values in differing(alike).items():
        texts = [shown(value) for value in values]
        usual, count = Counter(texts).most_common(1)[0]
        for settings, text in zip(own, texts, strict=True):
            if text and not (text == usual and 2 * count > len(texts)):
                settings.append(f"{name}={text}")
    return [", ".join(settings) for settings in own]


def differing(listed: Sequence[Entry]) -> dict[str, list[Any]]:
    """Setting -> its value in each run, for the settings that are not the same in all of them."""
    flat = [dict(flattened(entry.settings)) for entry in listed]
    names = sorted({name for one in flat for name in one})
    by_setting = {name: [one.get(name) for one in flat] for name in names}
    return {name: values for name, values in by_setting.items() if any(value != values[0] for value in values[1:])}


def flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"lora": {"rank": 8}}` -> ("lora.rank", 8); what has a column of its own is left out."""
    for name, value in settings.items():
        if prefix or name not in _NOT_SHOWN:
            if isinstance(value, Mapping):
                yield from flattened(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value


def shown(value: Any, widest: int = WIDEST) -> str:
    """A value as a reader takes it in: digests and long texts cut off."""
    if value is None:
        return ""
    if isinstance(value, str) and DIGEST.fullmatch(value):
        return value[:8]
    if isinstance(value, float):
        return f"{value:.6g}"
    text = ",".join(map(shown, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= widest else f"{text[: widest - 1]}…"
