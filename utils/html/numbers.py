"""Figures as people read them. Each takes a plain value; what is missing or not finite is a dash."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

MISSING = "–"


def exact(value: Any, form: Callable[[float], str]) -> Markup:
    """The figure in a `<data>` element whose value is the exact one: a program reads the same number as a person."""
    if not is_number(value):
        return Markup(MISSING)
    return Markup('<data value="{}">{}</data>').format(repr(value), form(value))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def nats(value: float) -> str:
    """A loss per token."""
    return _minus(f"{value:.3f}")


def gain(value: float) -> str:
    """A difference of losses, with its sign."""
    return _minus(f"{value:+.3f}")


def share(value: float) -> str:
    return _minus(f"{value:.1%}")


def perplexity(value: float) -> str:
    """Three or four digits; beyond a million as a power of ten."""
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def probability(value: float) -> str:
    """A p-value; below what resamples can tell it is a bound."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def general(value: float) -> str:
    """Any other number: whole and large ones with separators, the rest with four digits."""
    if (float(value).is_integer() or abs(value) >= 1000) and abs(value) < 1e15:
        return _minus(f"{value:,.0f}")
    return _minus(f"{value:.4g}")


def size(count: float) -> str:
    """Bytes, in units of 1000."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"


def span(seconds: float) -> str:
    """A duration."""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _minus(text: str) -> str:
    return text.replace("-", "−")
