"""One row of the support matrix: a toy checkpoint through every script, against stock transformers and PEFT.

Each cell is *works* with the number that was found, *refused* by the first script with its remedy, *fails later*, or
*wrong*. The reference knows nothing of this project: the class that config.json names, float32, PEFT's own loading;
every document, answer and choice is scored alone.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from scripts import compose, evaluate, inference, prepare_data, train_domain_adapter, train_task_adapter
from tests.support import relative, temporary_directory, write_jsonl
from utils import cli, logger
from utils.exceptions import PipelineError
from utils.export import merge_check, merged_logits
from utils.export.model_support import COLUMNS

WORKS, REFUSED, WRONG, LATER = "works", "refused", "WRONG", "FAILS LATER"
# relative to the largest logit, and nats of one item
LOGITS, NATS = 1e-5, 1e-4
WEIGHTS = (0.6, 1.3)
SYSTEM = "Answer briefly."


@dataclass(frozen=True)
class Cell:
    """What became of one column: the largest difference from the reference, or why there is none."""

    verdict: str
    number: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.verdict} {self.number:.0e}" if self.number is not None else self.verdict


@dataclass(frozen=True)
class Place:
    """Data and runs of one row. Data prepared for another toy of the same tokenizer are used again."""

    base: Path
    root: Path
    data: Path

    @property
    def flags(self) -> list[str]:
        return [
            *("--preset", "tiny_minimax_m2", "--base.source", str(self.base), "--base.name", "unused"),
            *("--run.models_dir", str(self.root / "models"), "--run.data_dir", str(self.data)),
            *("--task.system_prompt", SYSTEM),
        ]

    def run(self, script: Any, *flags: str) -> dict[str, Any]:
        """`script.main` with this place's settings; what it prints is not shown."""
        with contextlib.redirect_stdout(io.StringIO()):
            return script.main(cli.resolve([*self.flags, *flags], {}))


def row(base: Path, *, data: Path | None = None, extra: Sequence[str] = ()) -> dict[str, Cell]:
    """Column -> cell for the checkpoint in `base`; `extra` are flags for every script."""
    place = Place(base, root := temporary_directory(), data or root / "data")
    cells: dict[str, Cell] = {}
    try:
        place.run(prepare_data, *sources(place.data), *extra)
    except PipelineError as error:
        return dict.fromkeys(COLUMNS, Cell(REFUSED, reason=f"{error.problems[0].what} -> {error.problems[0].fix}"))
    checks = _Checks(place, extra)
    for column in COLUMNS:
        try:
            number, allowed = checks.of(column)
            cells[column] = Cell(WORKS if number <= allowed else WRONG, number)
        except PipelineError as error:
            cells[column] = Cell(LATER, reason=str(error))
        except Exception as error:  # noqa: BLE001  a traceback is what the matrix is there to find
            cells[column] = Cell(LATER, reason=f"{type(error).__name__}: {str(error)[:300]}")
        gc.collect()
    return cells


def sources(directory: Path) -> list[str]:
    """Documents of many lengths, and pairs with contexts longer than a window of 64 tokens, written once."""
    corpus, pairs = directory / "corpus.jsonl", directory / "pairs.jsonl"
    if not corpus.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        lines = [[f"Function f{n}_{w} returns {n * w} and raises E{w}." for w in range(1 + n % 5)] for n in range(14)]
        write_jsonl(corpus, [{"id": f"d{n}", "text": " ".join(texts)} for n, texts in enumerate(lines)])
        write_jsonl(pairs, [_pair(n) for n in range(20)])
    return ["--data.corpus", str(corpus), "--data.task", str(pairs), "--data.heldout_share", "0.5"]


def _pair(n: int) -> dict[str, Any]:
    choices = [f"it returns {n}", f"it raises E{n} at once", f"it prints {n}"]
    context = " ".join(f"Row {n}.{i} says {n * i}." for i in range(8))
    asked = {"id": f"q{n}", "document": f"m{n // 2}", "context": context, "question": f"What does f{n} do?"}
    return {**asked, "answer": choices[n % 3], "choices": choices}


class _Checks:
    """The columns in their order; each uses what the ones before it made."""

    def __init__(self, place: Place, extra: Sequence[str]):
        self.place, self.extra, self.runs = place, extra, dict[str, Path]()

    def of(self, column: str) -> tuple[float, float]:
        """(largest difference, what is allowed). Raises whatever the scripts raise."""
        if column not in ("domain training",) and "domain" not in self.runs:
            raise RuntimeError("an earlier step failed")
        checks: dict[str, Callable[[], tuple[float, float]]] = {
            "domain training": self._domain,
            "task training": self._task,
            "compose": self._compose,
            "two active": self._two_active,
            "streamed merge": self._merge,
            "inference": self._inference,
            "evaluate": self._evaluate,
        }
        return checks[column]()

    def _domain(self) -> tuple[float, float]:
        done = self.place.run(train_domain_adapter, *_steps("domain"), *self.extra)
        self.runs["domain"] = Path(done["run"])
        from datasets import load_from_disk

        prepared = Path(_manifest(self.runs["domain"])["parents"][0]["path"])
        ids = load_from_disk(str(prepared / "dev_documents"))["input_ids"]
        pieces = [one[at : at + 129] for one in ids for at in range(0, len(one), 128)]
        model = stock(self.place.base, self.runs["domain"] / "adapter")
        nlls = [nll(model, piece, 1) for piece in pieces if len(piece) > 1]
        return _difference(done["best_dev_loss"], nlls), NATS

    def _task(self) -> tuple[float, float]:
        done = self.place.run(train_task_adapter, *_steps("task"), *self.extra)
        self.runs["task"] = Path(done["run"])
        prepared = next(p for p in _manifest(self.runs["task"])["parents"] if p["kind"] == "prepared")
        model = stock(self.place.base, *(self.runs[stage] / "adapter" for stage in ("domain", "task")))
        tokenizer = _tokenizer(self.place.base)
        nlls = [
            nll(model, [*asked, *_answer(tokenizer, example["answers"][0])], len(asked))
            for example in _examples(Path(prepared["path"]) / "task_dev.jsonl")
            for asked in [_prompt(tokenizer, example)]
        ]
        return _difference(done["best_dev_loss"], nlls), NATS

    def _compose(self) -> tuple[float, float]:
        done = self.place.run(compose, "--weights", ",".join(map(str, WEIGHTS)), *self.extra)
        self.runs["composed"], self.measured = Path(done["composed"]), done
        composed = logits(stock(self.place.base, Path(done["adapter"])))
        return relative(composed, self._both()), LOGITS

    def _two_active(self) -> tuple[float, float]:
        return float(self.measured["parts_active_to_composed"]), LOGITS

    def _merge(self) -> tuple[float, float]:
        target = self.place.root / "merged"
        with mock.patch.object(merge_check, "_reloaded", _reloaded):
            self.place.run(inference, "--merge_path", str(target), *self.extra)
        return relative(logits(stock(target)), self._both()), LOGITS

    def _inference(self) -> tuple[float, float]:
        question = "What does f3 do?"
        done = self.place.run(inference, "--prompt", question, *self.extra)
        tokenizer, model = _tokenizer(self.place.base), stock(self.place.base, self.runs["composed"] / "adapter")
        asked = _prompt(tokenizer, {"question": question})
        with torch.no_grad():
            made = model.generate(
                input_ids=torch.tensor([asked]),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=0,
            )
        wanted = logger.printable(tokenizer.decode(made[0, len(asked) :], skip_special_tokens=True)).strip()
        return float(done["answer"] != wanted), 0.0

    def _evaluate(self) -> tuple[float, float]:
        done = self.place.run(evaluate, "--evaluate.generated_answers", "0", *self.extra)
        (path,) = Path(done["run"]).glob("cell_composed*.json")
        found = json.loads(path.read_text())
        found = found if "items" in found else found["value"]
        prepared = next(p for p in _manifest(self.runs["task"])["parents"] if p["kind"] == "prepared")
        model = stock(self.place.base, self.runs["composed"] / "adapter")
        tokenizer = _tokenizer(self.place.base)
        examples = {e["id"]: e for e in _examples(Path(prepared["path"]) / "task_test.jsonl")}
        differences = []
        for item in found["items"]:
            example = examples[item["name"]]
            asked = _prompt(tokenizer, example)
            for text, given in (
                (example["answers"][0], item["answer_nll"]),
                *zip(example["choices"], item["choice_nlls"], strict=True),
            ):
                answer = _answer(tokenizer, text)
                alone = nll(model, [*asked, *answer], len(asked))
                differences.append(abs(given - float(alone[:-1].double().sum())))
        return max(differences), NATS

    def _both(self) -> torch.Tensor:
        model = stock(self.place.base, *(self.runs[stage] / "adapter" for stage in ("domain", "task")))
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            for name, weight in zip(("part0", "part1"), WEIGHTS, strict=True):
                if name in layer.scaling:
                    layer.scaling[name] *= weight
        return logits(model)


def stock(base: Path, *adapters: Path) -> Any:
    """The model as transformers and PEFT load it, in float32, with all of these adapters active."""
    import transformers
    from peft import PeftModel

    named = json.loads((base / "config.json").read_text())["architectures"][0]
    kind = getattr(transformers, named, transformers.AutoModelForCausalLM)
    with logger.quiet_transformers():
        model = kind.from_pretrained(base, dtype=torch.float32).eval()
    for number, adapter in enumerate(adapters):
        if number:
            model.load_adapter(str(adapter), adapter_name=f"part{number}")
        else:
            model = PeftModel.from_pretrained(model, str(adapter), adapter_name="part0")
    if adapters:
        model.base_model.set_adapter([f"part{number}" for number in range(len(adapters))])
    return model.eval()


@torch.no_grad()
def nll(model: Any, ids: Sequence[int], first: int) -> torch.Tensor:
    """NLL of each token from `first` on, in a row of its own."""
    ids_1T = torch.tensor([list(ids)])
    scores = model(input_ids=ids_1T, use_cache=False).logits[0, first - 1 : -1].float()
    return F.cross_entropy(scores, ids_1T[0, first:], reduction="none")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits of two rows of 40 tokens."""
    ids_BT = torch.randint(3, 600, (2, 40), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids_BT, use_cache=False).logits.float()


def _difference(given: float, nlls: Sequence[torch.Tensor]) -> float:
    return abs(given - float(torch.cat(list(nlls)).double().mean()))


def _reloaded(directory: Path, ids_BT: torch.Tensor, scratch: Path) -> torch.Tensor:
    """In this process: a fresh one takes as long as everything else, and other tests start it."""
    with torch.no_grad():
        model = stock(directory)
        merged_logits.visit_every_expert(model)
        return model(ids_BT, use_cache=False).logits.float()


def _steps(stage: str) -> Iterator[str]:
    settings = {"max_steps": 2, "learning_rate": 0.01, "batch_tokens": 512, "micro_batch_tokens": 512}
    settings |= {"max_sequence_tokens": 384} if stage == "task" else {}
    yield from (f"--{stage}.train.{name}={value}" for name, value in settings.items())


def _manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())


def _examples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def _prompt(tokenizer: Any, example: dict[str, Any]) -> list[int]:
    context = example.get("context")
    asked = f"{context}\n\nQuestion: {example['question']}" if context else example["question"]
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _answer(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
