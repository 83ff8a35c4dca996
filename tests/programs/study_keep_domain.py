"""The study behind `task.keep_domain`: what each way of keeping the domain costs the answers, on dev of real domains.

    python -m tests.programs.study_keep_domain --work models/studies --corpora ../shared/data
    python -m tests.programs.study_keep_domain --list

A point is one task adapter on one domain adapter: trained, then scored on dev at weights of 1. Each finished point is
a line of docs/studies/keep_domain.jsonl and is not made again; a stopped one goes on from its checkpoint. The grid has
one seed, the setting that is the default three. Nothing here reads a test split.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from config import Config
from utils import cli
from utils.artifacts import files
from utils.models import devices

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "studies" / "keep_domain.jsonl"
DOMAINS = ("policies", "textbook", "demo")
FOLDERS = {"policies": "policyqa", "textbook": "openstax_anatomy"}
# the pairs and dev questions of 2026-11-28 (decision_document.md), and dev documents of about 8,000 tokens
PREPARED = {
    "policies": ["--data.max_train_examples", "200", "--data.max_dev_examples", "80"],
    "textbook": [],
    "demo": [],
}
DEV_DOCUMENTS = {"policies": "4", "textbook": "2", "demo": "20"}
SETTINGS: dict[str, list[str]] = {
    "off": [],
    "auto": ["--task.keep_domain", "auto"],
    "replay 0.1": ["--task.keep_domain", "replay", "--task.replay_share", "0.1"],
    "kl 0.1": ["--task.keep_domain", "kl", "--task.replay_share", "0.1"],
    "prompt 0.1": ["--task.prompt_loss_weight", "0.1"],
    "replay 0.05": ["--task.keep_domain", "replay", "--task.replay_share", "0.05"],
    "replay 0.25": ["--task.keep_domain", "replay", "--task.replay_share", "0.25"],
    "kl 0.3": ["--task.keep_domain", "kl", "--task.replay_share", "0.3"],
    "half rate": ["--task.train.learning_rate", "2.5e-4"],
    "replay 0.1, half rate": [
        *("--task.keep_domain", "replay", "--task.replay_share", "0.1"),
        *("--task.train.learning_rate", "2.5e-4"),
    ],
}
DEFAULT, FURTHER_SEEDS = "auto", (1, 2)


@dataclass(frozen=True)
class StudyPoint:
    """What one line of the results is about; `domain_steps` 0 are those of the default run."""

    domain: str
    domain_steps: int
    setting: str
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        return asdict(self)


def main() -> None:
    given = arguments()
    todo = [point for point in points(given) if point.key not in finished()]
    print(f"{len(todo)} points to make, {len(finished())} finished in {RESULTS.relative_to(ROOT)}", flush=True)
    for point in todo:
        print(json.dumps(point.key), flush=True)
        if not given.list:
            line = point.key | measured(point, given)
            with RESULTS.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("models/studies"), help="prepared data and adapters")
    parser.add_argument("--corpora", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real domains")
    parser.add_argument("--domains", default=",".join(DOMAINS))
    parser.add_argument("--settings", default=",".join(SETTINGS).replace("0.1, half", "0.1 half"))
    parser.add_argument(
        "--domain_steps", type=int, default=96, help="steps of the domain adapter; the demo's are usual"
    )
    parser.add_argument("--list", action="store_true", help="only say what is to be made")
    return parser.parse_args()


def points(given: argparse.Namespace) -> Iterator[StudyPoint]:
    """The grid of each domain that is there, then the further seeds of the default."""
    names = {name.replace("0.1, half", "0.1 half"): name for name in SETTINGS}
    settings = [names[name] for name in given.settings.split(",")]
    for domain in given.domains.split(","):
        if domain in FOLDERS and not (given.corpora / FOLDERS[domain]).is_dir():
            print(f"{domain}: {given.corpora / FOLDERS[domain]} is not there")
            continue
        steps = 0 if domain == "demo" else given.domain_steps
        yield from (StudyPoint(domain, steps, setting, 0) for setting in settings)
        if DEFAULT in settings:
            yield from (StudyPoint(domain, steps, DEFAULT, seed) for seed in FURTHER_SEEDS)


def finished() -> list[dict[str, Any]]:
    """The keys of the lines that are there."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    return [{name: row[name] for name in StudyPoint.__dataclass_fields__} for row in rows]


def measured(point: StudyPoint, given: argparse.Namespace) -> dict[str, Any]:
    """Train the point's adapters where they are missing, and score them on dev."""
    from utils.artifacts.runs import Run
    from utils.composition.methods import SUM
    from utils.composition.search import Keeping

    prepared = stage("prepare_data", point, given, *sources(point, given))
    pinned = ["--inputs.prepared", prepared["run"]]
    length = ["--domain.train.max_steps", str(point.domain_steps)] if point.domain_steps else []
    domain = stage("train_domain_adapter", point, given, *pinned, *length)
    pinned += ["--domain_adapter", domain["run"]]
    task = stage("train_task_adapter", point, given, *pinned, *SETTINGS[point.setting])
    runs = [Run(Path(found["run"]), files.verify(Path(found["run"]))) for found in (domain, task)]
    config = settings(point, given)
    probe = dev_probe(config, runs, Path(prepared["run"]))
    base, alone, both = (probe.point(SUM, weights) for weights in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)))
    kept, error = Keeping(base, alone, config.compose.domain_retention).share(both)
    trained = runs[1].manifest["measured"]
    return {
        "answer_nll_with_end": both.answer_nll,
        "answer_nll_with_end_domain_alone": alone.answer_nll,
        "domain_nll": {"base": base.domain_nll, "domain": alone.domain_nll, "both": both.domain_nll},
        "kept": kept,
        "kept_error": error,
        "dev_questions": len(both.answer_nlls),
        "dev_documents": len(both.document_nlls),
        "steps": trained["steps"],
        "trained_tokens": trained["trained_tokens"],
        "training_seconds": trained["seconds"],
        "keeping": trained.get("keeping"),
        "domain_trained_tokens": runs[0].manifest["measured"]["trained_tokens"],
        "date": time.strftime("%Y-%m-%d"),
    }


def dev_probe(config: Config, runs: list[Any], prepared: Path) -> Any:
    """Base, domain and task adapter on one model, with the dev data to ask them about."""
    from utils.adapters import adapter_files
    from utils.composition import dev_losses
    from utils.planning import preflight

    base = preflight.start(config)
    parts = [adapter_files.load(run.adapter, base) for run in runs]
    data = dev_losses.dev_data(config, base, prepared, config.task.system_prompt)
    return dev_losses.DevProbe.on(base, config.base, parts, data)


def sources(point: StudyPoint, given: argparse.Namespace) -> list[str]:
    """Flags of prepare_data."""
    if point.domain not in FOLDERS:
        return []
    folder = given.corpora / FOLDERS[point.domain]
    named = {"corpus": "corpus", "corpus_heldout": "corpus_heldout", "task": "train"}
    named |= {"task_dev": "dev", "task_test": "test"}
    found = [word for name, file in named.items() for word in (f"--data.{name}", str(folder / f"{file}.jsonl"))]
    return found + PREPARED[point.domain]


def settings(point: StudyPoint, given: argparse.Namespace, *flags: str) -> Config:
    """The settings of a stage, with everything below --work."""
    places = ["--run.data_dir", str(given.work / "data"), "--run.models_dir", str(given.work / "models")]
    few = ["--compose.max_dev_items", "80", "--compose.max_dev_documents", DEV_DOCUMENTS[point.domain]]
    saved = ["--domain.train.save_every_steps", "4", "--task.train.save_every_steps", "4"]
    return cli.resolve([*places, *few, *saved, "--run.trackers", "none", "--run.seed", str(point.seed), *flags], {})


def stage(name: str, point: StudyPoint, given: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """One script of the pipeline in this process; data and domain adapter are those of seed 0."""
    if name != "train_task_adapter":
        point = StudyPoint(point.domain, point.domain_steps, point.setting, 0)
    config = settings(point, given, *flags)
    devices.set_threads(config.run.threads)
    return importlib.import_module(f"scripts.{name}").main(config)


if __name__ == "__main__":
    main()
