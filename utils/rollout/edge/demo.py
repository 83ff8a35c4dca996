"""The whole canary on one machine: the embedded base model, a good and a bad candidate, a real HAProxy, real traffic.

Writes models/rollout-demo/: `production` (the base), `good` (the base merged with a tiny adapter) and `bad` (the
same, but its end-of-turn token is lost, as after a mix-up of tokenizers: HTTP stays healthy, answers never end). The
settings are loosened so that a laptop's few requests are enough; everything else is what a real rollout does.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch

from config import BaseModelSection, MergeSection, RolloutSection
from utils.adapters.factors import ModuleFactors
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.exceptions import RolledBack
from utils.export import merge
from utils.logger import event
from utils.models import sources
from utils.models.base_model import BaseModel
from utils.models.weights.safetensors_io import Checkpoint
from utils.rollout.edge import golden, service
from utils.rollout.edge.load import Load

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Russia": "Moscow",
    "Greece": "Athens",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Ireland": "Dublin",
    "Belgium": "Brussels",
    "Hungary": "Budapest",
    "China": "Beijing",
    "India": "New Delhi",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Kenya": "Nairobi",
}
SETTINGS: dict[str, Any] = {
    "serve_command": "transformers serve {model} --host 127.0.0.1 --port {port} --device cpu",
    "steps": (0.3,),
    "ratios": (3.0,),
    "margins": (0.35,),
    "objective": 0.5,
    "probe_seconds": 0.2,
    "probe_tokens": 24,
    "preflight_prompts": 0,
    "min_step_seconds": 2.0,
    "step_minutes": 4.0,
    "bake_minutes": 0.05,
    "bake_units": 3,
    "drain_seconds": 5.0,
    "lease_seconds": 20.0,  # two models on a laptop's cores can keep the controller waiting
}
REQUESTS_PER_SECOND = 0.7


def run(section: BaseModelSection, models_dir: Path, haproxy: str) -> dict[str, Any]:
    """Both rollouts, one after the other; the balancer and the servers are ended whatever happens."""
    base = sources.fetch(section, models_dir)
    home = models_dir / "rollout-demo"
    places = {name: home / name for name in ("production", "good", "bad")}
    for name, make in (("production", _production), ("good", _good), ("bad", _bad)):
        if not (places[name] / files.MANIFEST).exists():
            make(base, section, places)
    prompts_path = home / "golden.jsonl"
    rows = [{"question": _question(c), "answers": [capital]} for c, capital in CAPITALS.items()]
    files.write_text(prompts_path, "".join(json.dumps(row) + "\n" for row in rows))
    prompts = golden.read(prompts_path, "You answer questions briefly and correctly.")
    outcomes: dict[str, Any] = {}
    name = f"demo-{time.strftime('%H%M%S')}"
    try:
        for candidate in ("bad", "good"):
            paths = {"production": str(places["production"]), "candidate": str(places[candidate])}
            settings = RolloutSection(service=name, haproxy=haproxy, **paths, **SETTINGS)
            outcomes[candidate] = _one(service.Service(settings, models_dir), prompts)
            event(f"the {candidate} candidate: {outcomes[candidate]['outcome']}", **outcomes[candidate])
    finally:
        service.stop(service.Service(RolloutSection(service=name, haproxy=haproxy), models_dir))
    return outcomes


def _one(target: service.Service, prompts: list[golden.Prompt]) -> dict[str, Any]:
    began, over = time.monotonic(), threading.Event()
    results: list[Any] = []
    users = threading.Thread(target=_users, args=(target, over, results), daemon=True)
    users.start()
    try:
        outcome = service.start(target, prompts, seed=0)
    except RolledBack as back:
        outcome = {"outcome": "rolled back", "reason": back.problems[0].what}
    finally:
        over.set()
        users.join()
    failures = sum(bool(result.error) for result in results)
    return outcome | {"seconds": round(time.monotonic() - began), "requests": len(results), "failed": failures}


def _users(target: service.Service, over: threading.Event, results: list[Any]) -> None:
    """A bounded load, as soon as there is a balancer."""
    while not over.wait(0.5):
        current = service.Service(target.section, target.home.parents[1])
        if current.rollout is not None and current.balancer.master() is not None:
            break
    else:
        return
    questions = tuple(_question(country) for country in CAPITALS)
    address = f"127.0.0.1:{current.facts['port']}"
    with Load(
        address, REQUESTS_PER_SECOND, questions, session_requests=1, session_share=0.5, max_tokens=8, timeout_s=120
    ) as load:
        over.wait()
    results += load.results


def _question(country: str) -> str:
    return f"What is the capital of {country}? Answer with its name only."


def _production(base: BaseModel, section: BaseModelSection, places: dict[str, Path]) -> None:
    with files.publish(places["production"], lambda: _facts(base, "production")) as directory:
        for path in files.artefact_files(base.directory):
            if path.name != files.MANIFEST:
                shutil.copyfile(path, directory / path.name)


def _good(base: BaseModel, section: BaseModelSection, places: dict[str, Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    checkpoint = Checkpoint(base.directory)
    factors = {}
    for name in checkpoint.homes:
        if name.endswith("q_proj.weight"):
            rows, columns = checkpoint.tensor(name).shape
            a_rI = torch.randn(4, columns, generator=generator) / columns**0.5
            factors[name.removesuffix(".weight")] = ModuleFactors(a_rI, torch.randn(rows, 4, generator=generator), 1e-3)
    merge.merge(
        base,
        factors,
        places["good"],
        MergeSection(),
        section,
        fingerprint=files.fingerprint(["rollout-demo", base.digest]),
        manifest=lambda checks: _facts(base, "good") | {"measured": checks},
        card="# The good candidate of the rollout demo\n",
    )


def _bad(base: BaseModel, section: BaseModelSection, places: dict[str, Path]) -> None:
    with files.publish(places["bad"], lambda: _facts(base, "bad")) as directory:
        for path in files.artefact_files(places["good"]):
            if path.name != files.MANIFEST:
                shutil.copyfile(path, directory / path.name)
        for name in ("config.json", "generation_config.json"):
            if (directory / name).exists():
                values = files.read_json(directory / name)
                files.write_json(directory / name, values | {"eos_token_id": values.get("vocab_size", 49_152) - 1})


def _facts(base: BaseModel, which: str) -> dict[str, Any]:
    identity = Identity.of("merged", {"made_for": "rollout-demo", "base": base.digest, "which": which})
    return runs.manifest("merged", identity, base=base.record(), parents=[], measured={})
