"""Which documents a comparison reads: held out, of the corpus, and ordinary prose, in windows of one size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from config import EvaluateSection, TrainSection
from utils.data.batches import PackedDocuments
from utils.data.documents import read_documents
from utils.data.prepared import Prepared
from utils.data.splits import hash_share
from utils.evaluation.intervals import MIN_CLUSTERS
from utils.exceptions import DataError, Problem
from utils.logger import warning
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.models.structure import model_class

WINDOW_TOKENS = 1024
SEEN_DOCUMENTS = 60
# claim that rests on held-out documents -> what it is about
ABOUT = {"H1": "whether the domain is kept (H1)", "D1": "whether the domain adapter helps (D1)"}
GENERAL = Path(__file__).with_name("general.jsonl")


def of_data(
    settings: EvaluateSection, seed: int, base: BaseModel, source: Prepared, pad_id: int, *, claim: str = "H1"
) -> dict[str, PackedDocuments]:
    """Held-out documents of prepared data ("heldout") and some of those that were trained on ("seen"), as far as they
    are there. `claim` is the one that rests on the held-out ones; with none their number is nobody's concern."""
    window = _window(settings, base)
    by_name, most = {}, settings.max_heldout_documents
    for name, which, limit in (
        ("heldout", "heldout_documents", most),
        ("seen", "corpus", min(SEEN_DOCUMENTS, most or SEEN_DOCUMENTS)),
    ):
        if (source.directory / which).is_dir():
            documents = source.documents(which)
            there = len(documents)
            if limit and len(documents) > limit:
                ids = documents["id"][:]
                order = sorted(range(len(ids)), key=lambda i, ids=ids: hash_share(ids[i], seed))
                documents = documents.select(sorted(order[:limit]))
            if name == "heldout" and claim and len(documents) < MIN_CLUSTERS:
                # said before the hours that an evaluation may take
                few = f"{ABOUT[claim]} is not tested with fewer than {MIN_CLUSTERS} held-out documents: "
                warning(f"{few}{_more(there)}", scored=len(documents), held_out=there)
            by_name[name] = PackedDocuments(documents, window, 0, pad_id)
    return by_name


def _more(there: int) -> str:
    """How more of the held-out documents that are `there` are scored, or that it takes other data."""
    if there >= MIN_CLUSTERS:
        return f"--evaluate.max_heldout_documents {there} scores all of them"
    return (
        "no setting of this command adds any; prepare data with more (--data.corpus_heldout PATH, "
        "or a larger --data.heldout_share) and train anew"
    )


def general(settings: EvaluateSection, base: BaseModel, tokenizer: Any, pad_id: int, scratch: Path) -> PackedDocuments:
    """Ordinary prose, for what was forgotten. Raises DataError where the person's own is not there."""
    window = _window(settings, base)
    path = Path(settings.general_text or GENERAL)
    if not path.exists():
        raise DataError(Problem("evaluate.general_text: no such file or folder", str(path)))
    try:
        texts, _ = read_documents((str(path),), cache_dir=scratch)
        return PackedDocuments(_tokenised(texts, tokenizer), window, 0, pad_id)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tokenised(texts: Any, tokenizer: Any) -> Any:
    return texts.map(
        lambda batch: {
            "input_ids": (ids := chat.document_ids(tokenizer, batch["text"])),
            "num_tokens": [len(tokens) for tokens in ids],
            "utf8_bytes": [len(text.encode()) for text in batch["text"]],
        },
        batched=True,
        keep_in_memory=True,
        desc="tokenising general text",
    )


def _window(settings: EvaluateSection, base: BaseModel) -> TrainSection:
    size = max(WINDOW_TOKENS, settings.batch_tokens)
    window = model_class.longest_row(base.directory, WINDOW_TOKENS)
    return TrainSection(max_sequence_tokens=window, micro_batch_tokens=size)
