"""The embedded demo's splits: which of Python's modules are trained on, asked about, and held out.

Documents of the train, dev and test modules are the corpus; questions about the dev and test modules are in no
training pair. So what the model knows about them can only come from the domain adapter, and the form of the answer
only from the task adapter. The held-out modules are in neither: perplexity is measured on them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from utils.data.domains.built_in import BuiltIn
from utils.data.domains.python_docs import python_documents, python_qa, standard_modules
from utils.data.splits import hash_share

# many small modules rather than a few large ones: intervals are over modules, so their number is what gives certainty
QUESTIONS_PER_MODULE = range(6, 37)
DOCUMENTS_PER_MODULE = range(6, 61)
# short documents only, so that the demo trains within its minutes on two cores
MEAN_DOCUMENT_CHARACTERS = 300
HELD_OUT_SHARE = 0.05
QUESTIONS = {"test": 200, "dev": 60, "train": 400, "heldout": 80}


def python_demo(seed: int) -> BuiltIn:
    """The demo of the running Python; the same on every machine with the same version and platform."""
    documents = list(python_documents(standard_modules()))
    questions = python_qa(standard_modules())
    modules = _choose(documents, questions, seed)
    examples = {s: [q for q in questions if q["document"] in modules[s]] for s in ("train", "dev", "test")}
    sentences = {text for split in ("dev", "test") for q in examples[split] for text in (q["question"], *q["answers"])}
    clean = [q for q in examples["train"] if not {q["question"], *q["answers"]} & sentences]
    dropped = {"train pairs with a sentence of dev or test": len(examples["train"]) - len(clean)}
    trained = {m for split in ("train", "dev", "test") for m in modules[split]}
    return BuiltIn(
        documents=[d for d in documents if d["module"] in trained],
        heldout=[d for d in documents if d["module"] in modules["heldout"]],
        examples=examples | {"train": clean},
        groups=modules,
        dropped=dropped,
    )


def other_modules(seed: int) -> BuiltIn:
    """As much documentation of modules that are in no split of the demo: a wrong domain of the same form."""
    demo = python_demo(seed)
    ours = {module for modules in demo.groups.values() for module in modules}
    others = [d for d in python_documents(standard_modules()) if d["module"] not in ours]
    chosen = _as_much(others, sum(len(d["text"]) for d in demo.documents), seed)
    held = max(2, round(HELD_OUT_SHARE * len(chosen)))
    return BuiltIn(documents=chosen[held:], heldout=chosen[:held], examples={}, groups={}, dropped={})


def _as_much(documents: list[dict[str, str]], characters: int, seed: int) -> list[dict[str, str]]:
    """Documents in hash order until they have that many characters."""
    sample = []
    for document in sorted(documents, key=lambda d: hash_share(d["id"], seed)):
        if characters <= 0:
            break
        sample.append(document)
        characters -= len(document["text"])
    return sample


def _choose(documents: list[dict[str, str]], questions: list[dict[str, Any]], seed: int) -> dict[str, list[str]]:
    """Modules of each split, taken in hash order until the split has its questions."""
    num_questions = Counter(q["document"] for q in questions)
    written = Counter(d["module"] for d in documents)
    characters = Counter[str]()
    for document in documents:
        characters[document["module"]] += len(document["text"])
    fitting = [
        module
        for module in sorted(written)
        if num_questions[module] in QUESTIONS_PER_MODULE
        and written[module] in DOCUMENTS_PER_MODULE
        and characters[module] <= MEAN_DOCUMENT_CHARACTERS * written[module]
    ]
    order = iter(sorted(fitting, key=lambda module: hash_share(module, seed)))
    chosen: dict[str, list[str]] = {}
    for split, quota in QUESTIONS.items():
        chosen[split] = []
        while sum(num_questions[m] for m in chosen[split]) < quota and (module := next(order, None)):
            chosen[split].append(module)
    return chosen
