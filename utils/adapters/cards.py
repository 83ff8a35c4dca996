"""Model cards: the README.md of an adapter, a composed adapter and a merged model, with the hub's metadata.

A card says how to use what lies beside it, how it was made and from what; `model_index` adds how good it is. It holds
no path of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

import yaml

from utils.artifacts import files
from utils.artifacts.runs import Run
from utils.models import chat, template_fitting
from utils.models.base_model import BaseModel
from utils.models.directory_checks import CONFIG
from utils.models.model_shapes import PLAIN

TRAINED = {
    "domain": "next-token prediction on unlabelled documents",
    "task": "supervised pairs, with the loss on the answer only",
}
# from the directory of one run's adapter to the other runs, as utils/artifacts/runs.py lays them out
RUNS = "{folder}/../../../"
_HERE = 'folder, version = ".", None  # this directory from wherever you are, or a repository and its branch'
# in a run's manifest: what an adapter of another tool was made for, where a person asserted that it is this base
ASSERTED = "asserted_base"


def adapter_card(stage: str, base: BaseModel, parents: Sequence[Run], *, system_prompt: str = "") -> str:
    """Card of a domain or a task adapter."""
    below = next((parent for parent in parents if stage == "task" and parent.manifest["kind"] == "domain"), None)
    lines = [f"LoRA, trained by {TRAINED[stage]}."]
    if below:
        lines += ["", "It was trained on the frozen domain adapter named below and is used together with it."]
    lines += _usage(_adapter_snippet(stage, base, system_prompt, below))
    return _card(_adapter_metadata(stage, base), f"{stage.capitalize()} adapter", [*lines, *_lineage(base, parents)])


def composed_card(
    base: BaseModel,
    parents: Sequence[Run],
    *,
    method: str,
    source: str,
    weights: Sequence[float],
    exact: bool,
    searched: bool,
    check: str,
) -> str:
    """Card of several adapters composed into one; `source` is the method's paper, `weights` as many for each parent."""
    lines = [
        f"{len(parents)} adapters as one LoRA adapter." if len(parents) > 1 else "One adapter with its weight in it.",
        *_usage(_adapter_snippet("composed", base, _system_prompt(parents))),
        *_composition(parents, method, source, weights, exact=exact, searched=searched),
        *_self_check(check),
        *_lineage(base, parents),
    ]
    return _card(_adapter_metadata("composed", base), "Composed adapter", lines)


def merged_card(
    base: BaseModel,
    parents: Sequence[Run],
    *,
    method: str,
    source: str,
    weights: Sequence[float],
    exact: bool,
    searched: bool,
    dtype: str,
    check: str = "",
) -> str:
    """Card of a standalone merged model; `dtype` is what its weights were rounded to, base is the checkpoint's own."""
    metadata = {
        "library_name": "transformers",
        "base_model": base_id(base),
        # not merge: on a hub that is several models made into one; this is one model plus what was trained on it
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
        "tags": ["lora-merged"],
    }
    kept = "the dtype of the base model's files" if dtype == "base" else dtype.removeprefix("torch.")
    lines = [
        "A base model with adapters merged into its weights. It loads like any other model, without peft.",
        *_usage(_merged_snippet(base, _system_prompt(parents))),
        *_request(_system_prompt(parents)),
        *_composition(parents, method, source, weights, exact=exact, searched=searched),
        "",
        f"The weights were summed in float32 and rounded once, to {kept}.",
        *_self_check(check),
        *_lineage(base, parents),
    ]
    return _card(metadata, "Merged model", lines)


def copied_card(base: BaseModel, *, dtype: str) -> str:
    """Card of a base model's weights in another dtype, without any adapter."""
    metadata = {
        "library_name": "transformers",
        "base_model": base_id(base),
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
    }
    kept = "as its files have them, FP8 dequantized to bfloat16" if dtype == "base" else f"in {dtype}"
    lines = [f"A copy of the base model's weights, {kept}.", *_usage(_merged_snippet(base, "")), *_lineage(base, [])]
    return _card(metadata, "Copy of a base model", lines)


def asserted(base: BaseModel, runs: Sequence[Run]) -> list[str]:
    """For each adapter made for other files than the base's: a sentence that a person asserted them to be the same."""
    sentences = []
    for run in runs:
        recorded = run.manifest.get("base") or {}
        differs = run.manifest.get("kind") in (*TRAINED, "composed") and recorded.get("digest") != base.digest
        if differs or ASSERTED in run.manifest:
            other = run.manifest.get(ASSERTED) or str(recorded.get("source"))
            made_for = PurePath(other.split(" ")[0]).name
            sentences.append(
                f"{_named(run)} was made for {made_for}: that this base is the same was asserted, not verified"
            )
    return sentences


def for_hub(card: str, repository: str, branch: str = "") -> str:
    """The card as it is published: its snippet loads from the repository instead of from this directory."""
    there = f"folder, version = {json.dumps(repository)}, {json.dumps(branch) if branch else None}"
    return card.replace(_HERE, there).replace(f'f"{RUNS}base/', '"')  # a base that is on no hub is somewhere else there


def base_id(base: BaseModel) -> str:
    """The base model as a hub would name it; a path of this machine says nothing elsewhere and stays out."""
    if _is_on_hub(base):
        return base.source
    # a hub refuses a card whose base model has other characters
    return re.sub(r"[^A-Za-z0-9._-]+", "-", base.directory.name).strip("-.") or "base"


def _is_on_hub(base: BaseModel) -> bool:
    """A commit can be given beside a local directory too; then the directory is what was used."""
    return bool(base.revision) and Path(base.source) != base.directory


def _adapter_metadata(stage: str, base: BaseModel) -> dict[str, object]:
    """What PEFT writes, with the relation said and not inferred."""
    return {
        "library_name": "peft",
        "base_model": base_id(base),
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": sorted([f"base_model:adapter:{base_id(base)}", "lora", "transformers", f"{stage}-adapter"]),
    }


def _adapter_snippet(stage: str, base: BaseModel, system_prompt: str, below: Run | None = None) -> list[str]:
    """Base model and adapter; for a task adapter trained on a domain adapter, both, active together."""
    name, commit, note = json.dumps(base.source), json.dumps(base.revision), ""
    if not _is_on_hub(base):
        name, commit, note = json.dumps(base.directory.name), "None", "  # its directory: this base model is on no hub"
        if base.directory.parent.name == "base":
            name = f'f"{RUNS}base/{base.directory.name}"'
    kind = _class_name(base)
    load = ["model = PeftModel.from_pretrained(model, folder, revision=version)"]
    if below:
        load = [
            f'domain = f"{RUNS}domain/{below.directory.name}/adapter"',
            'model = PeftModel.from_pretrained(model, domain, adapter_name="domain")',
            'model.load_adapter(folder, adapter_name="task", revision=version)',
            'model.base_model.set_adapter(["domain", "task"])',
        ]
    return [
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted((kind, 'AutoTokenizer')))}",
        "",
        _HERE,
        f"base, commit = {name}, {commit}{note}",
        "tokenizer = AutoTokenizer.from_pretrained(base, revision=commit)",
        f"model = {kind}.from_pretrained(base, revision=commit)",
        *load,
        *(_continue_text() if stage == "domain" else _answer(base, system_prompt)),
    ]


def _merged_snippet(base: BaseModel, system_prompt: str) -> list[str]:
    kind = _class_name(base)
    return [
        f"from transformers import {', '.join(sorted((kind, 'AutoTokenizer')))}",
        "",
        _HERE,
        "tokenizer = AutoTokenizer.from_pretrained(folder, revision=version)",
        f"model = {kind}.from_pretrained(folder, revision=version)",
        *_answer(base, system_prompt),
    ]


def _class_name(base: BaseModel) -> str:
    """The class that loads all of the base: a multimodal checkpoint's own, as the automatic one may take a part."""
    path = base.directory / CONFIG
    named = (files.read_object(path).get("architectures") if path.is_file() else None) or [""]
    return named[0] if named[0].endswith("ForConditionalGeneration") else "AutoModelForCausalLM"


def _answer(base: BaseModel, system_prompt: str) -> list[str]:
    turns = [{"role": "system", "content": system_prompt}] if system_prompt else []
    turns.append({"role": "user", "content": "Your question"})
    if system_prompt and (base.directory / "tokenizer_config.json").is_file():
        turns = template_fitting.fitted(chat.load_tokenizer(base.directory), turns)
    return [
        "messages = [",
        *(f"    {json.dumps(turn)}," for turn in turns),
        "]",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        "output = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _continue_text() -> list[str]:
    return [
        'inputs = tokenizer("The beginning of a document", return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=64)",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ]


def _usage(snippet: Sequence[str]) -> list[str]:
    return ["", "## Use", "", "```python", *snippet, "```"]


def _request(system_prompt: str) -> list[str]:
    """The body of a request to a server: without the system message that was trained with, answers are others."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    body = {"model": "NAME", "messages": [*system, {"role": "user", "content": "Your question"}], "temperature": 0}
    intro = "Behind a server with OpenAI's HTTP API, send what it was trained with, the system message first:"
    return ["", intro, "", "```json", json.dumps(body, ensure_ascii=False), "```"]


def _composition(
    parents: Sequence[Run], method: str, source: str, weights: Sequence[float], *, exact: bool, searched: bool
) -> list[str]:
    kind = "Exact: up to rounding, the weighted sum of the adapters' updates." if exact else "An approximation."
    choice = "The weights were chosen on the dev split." if searched else "The weights were not searched."
    given = list(weights) or [1.0] * len(parents)
    numbers, left = divmod(len(given), len(parents))
    if left:
        raise ValueError(f"{len(given)} weights do not fit {len(parents)} adapters")
    rows = [
        f"| {_named(parent)} | {', '.join(f'{w:g}' for w in given[i * numbers : (i + 1) * numbers])} |"
        for i, parent in enumerate(parents)
    ]
    lines = [f"`{method}`: {source}.", "", f"{kind} {choice}"]
    return ["", "## Method", "", *lines, "", "| adapter | weight |", "|---|---|", *rows]


def _self_check(check: str) -> list[str]:
    return ["", f"Self-check: {check}"] if check else []


def _lineage(base: BaseModel, parents: Sequence[Run]) -> list[str]:
    made_from = f", made from `{base.source}`" if base.source.startswith(("wheel:", "toy:")) else ""
    commit = f" at `{base.revision}`" if _is_on_hub(base) else ""
    if base.quantization != PLAIN:
        made_from += f", quantised to {base.quantization} by bitsandbytes: its de-quantised weights are the base"
    return [
        "",
        "## Lineage",
        "",
        f"* base `{base_id(base)}`{commit}{made_from}, digest `{base.digest}`",
        *(f"* {_named(parent)}, digest `{parent.digest}`" for parent in parents),
        *(f"* {sentence}" for sentence in asserted(base, parents)),
    ]


def _named(run: Run) -> str:
    return f"{run.manifest['kind']} `{run.directory.name}`"


def _system_prompt(parents: Sequence[Run]) -> str:
    """The one that the task adapter among the parents was trained with."""
    return next((str(p.manifest["system_prompt"]) for p in parents if p.manifest.get("system_prompt")), "")


def _card(metadata: dict[str, object], title: str, lines: Sequence[str]) -> str:
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n# {title}\n\n" + "\n".join(lines) + "\n"
