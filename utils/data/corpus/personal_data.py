"""Counts of personal data that has a form: mail addresses, phone numbers, IBANs, card numbers, IP addresses.

By presidio's pattern recognisers alone, each with its own checksum or validation; no language engine, so no model is
downloaded. Names of persons and places have no form: they are not counted, and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from utils.exceptions import DataError, Problem
from utils.progress import Progress

# of a recogniser that is not certain, phone numbers for example, with the words around it left out
SMALLEST_SCORE = 0.4
CHARACTERS_AT_ONCE = 100_000
NOT_COUNTED = "names of persons, places and organisations, addresses"


def personal_data(texts: Iterable[str], total: int) -> dict[str, Any]:
    """{"found": kind -> number, "documents": documents with any, "not_counted": what no pattern finds}.

    Raises DataError with the command that installs presidio where it is missing.
    """
    recognisers = _recognisers()
    counts = {recogniser.supported_entities[0].lower(): 0 for recogniser in recognisers}
    documents = 0
    with Progress("personal data", total=total, unit="document") as bar:
        for text in texts:
            before = sum(counts.values())
            for start in range(0, len(text), CHARACTERS_AT_ONCE):
                part = text[start : start + CHARACTERS_AT_ONCE]
                for recogniser in recognisers:
                    entity = recogniser.supported_entities[0]
                    results = recogniser.analyze(part, [entity], None) or []
                    places = {(r.start, r.end) for r in results if r.score >= SMALLEST_SCORE}
                    counts[entity.lower()] += len(places)
            documents += sum(counts.values()) > before
            bar.advance(1)
    return {"found": counts, "documents": documents, "not_counted": NOT_COUNTED}


def _recognisers() -> list[Any]:
    try:
        import tldextract
        from presidio_analyzer import predefined_recognizers as known
    except ImportError as error:
        fix = "pip install presidio-analyzer, or leave --data.personal_data out"
        raise DataError(
            Problem("personal data is counted by presidio, which is not installed", str(error), fix)
        ) from error
    # it would fetch today's list of domains; the one in the package does
    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    return [
        known.EmailRecognizer(),
        known.PhoneRecognizer(),
        known.IbanRecognizer(),
        known.CreditCardRecognizer(),
        known.IpRecognizer(),
    ]
