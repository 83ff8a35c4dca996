"""How much data a plan counts with: the settings, else the newest prepared data, else a stated guess. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from config import Config

DOMAIN_TOKENS, TASK_TOKENS, TEST_ITEMS, DOCUMENT_TOKENS = 10_000_000, 1_000_000, 1_000, 2_000
# documents of the corpus itself that evaluate scores beside the held-out ones
CORPUS_DOCUMENTS = 60


@dataclass(frozen=True)
class PlannedData:
    """Tokens of one pass over the training data, and what is scored."""

    domain_tokens: int
    task_tokens: int
    dev_items: int
    test_items: int
    item_tokens: int
    dev_documents: int
    heldout_documents: int
    document_tokens: int

    def trained(self, stage: str) -> int:
        """Tokens of one epoch of a stage."""
        return self.domain_tokens if stage == "domain" else self.task_tokens

    @property
    def dev_tokens(self) -> int:
        """Tokens that are scored at one point of a weight search."""
        return self.dev_items * self.item_tokens + self.dev_documents * self.document_tokens

    @property
    def test_tokens(self) -> int:
        """Tokens that are scored for one row of an evaluation."""
        documents = self.heldout_documents + min(CORPUS_DOCUMENTS, self.heldout_documents)
        return self.test_items * self.item_tokens + documents * self.document_tokens


def of(config: Config, counts: Mapping[str, Any] | None = None) -> PlannedData:
    """`counts` are those in the manifest of prepared data; what they lack is guessed."""
    plan = config.plan
    documents, examples = (counts or {}).get("documents") or {}, (counts or {}).get("examples") or {}
    held = documents.get("heldout_documents") or {}
    number = held.get("documents") or config.evaluate.max_heldout_documents or 200
    there = {split: (examples.get(split) or {}).get("examples") for split in ("train", "dev", "test")}
    guessed = round(held["tokens"] / held["documents"]) if held.get("documents") else DOCUMENT_TOKENS
    task = there["train"] * plan.item_tokens if there["train"] else TASK_TOKENS
    return PlannedData(
        domain_tokens=plan.domain_tokens or (documents.get("corpus") or {}).get("tokens") or DOMAIN_TOKENS,
        task_tokens=plan.task_tokens or task,
        dev_items=_limited(there["dev"] or config.compose.max_dev_items or 200, config.compose.max_dev_items),
        test_items=plan.test_items or there["test"] or TEST_ITEMS,
        item_tokens=plan.item_tokens,
        dev_documents=_limited(number, config.compose.max_dev_documents),
        heldout_documents=_limited(number, config.evaluate.max_heldout_documents),
        document_tokens=plan.document_tokens or guessed,
    )


def _limited(number: int, limit: int) -> int:
    """0 is no limit."""
    return min(number, limit) if limit else number
