"""Model cards: the README.md of an adapter and of a merged model, with the hub's metadata."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from utils.base_model import BaseModel
from utils.runs import Run


def adapter_card(stage: str, base: BaseModel, parents: Sequence[Run]) -> str:
    """Card of a domain, task or composed adapter."""
    metadata = {
        "library_name": "peft",
        "base_model": base_id(base),
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "transformers", f"{stage}-adapter"],
    }
    what = {"domain": "next-token prediction on unlabelled documents", "task": "supervised question-answer pairs"}.get(
        stage
    )
    trained = f"Trained by {what}." if what else "The exact weighted sum of the adapters below."
    return _card(metadata, f"{stage.capitalize()} adapter", [trained, *_lineage(base, parents)])


def merged_card(base: BaseModel, parents: Sequence[Run], weights: Sequence[float]) -> str:
    """Card of a standalone merged model."""
    metadata = {
        "library_name": "transformers",
        "base_model": base_id(base),
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
        "tags": ["lora-merged"],
    }
    rule = f"Base + {weights[0]:g} x domain delta + {weights[1]:g} x task delta, summed in float32 and rounded once."
    return _card(metadata, "Merged model", [rule, *_lineage(base, parents)])


def base_id(base: BaseModel) -> str:
    """The base model as a hub would name it; a path of this machine says nothing elsewhere and stays out."""
    return base.source if base.revision else base.directory.name


def _card(metadata: dict[str, object], title: str, lines: Sequence[str]) -> str:
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {title}\n\n" + "\n".join(lines) + "\n"


def _lineage(base: BaseModel, parents: Sequence[Run]) -> list[str]:
    rows = [f"* base: `{base_id(base)}` {base.revision} (digest `{base.digest[:16]}`)"]
    return [
        "",
        "Lineage:",
        "",
        *rows,
        *(f"* {p.manifest['kind']}: `{p.directory.name}` (digest `{p.digest[:16]}`)" for p in parents),
    ]
