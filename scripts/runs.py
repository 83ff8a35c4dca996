"""The runs that are here: listed, compared, removed, carried to another machine.

The first word is the command, then the runs it is about (as `list` names them):

    python scripts/runs.py list
    python scripts/runs.py show task/smollm2_135m-1a2b3c4d
    python scripts/runs.py compare domain/first domain/second     settings that differ, results side by side
    python scripts/runs.py best                                   by dev loss or verdict, for each stage, base and data
    python scripts/runs.py rm task/first --yes                    without --yes it only says what would go
    python scripts/runs.py prune --runs.older_than_days 30 --yes  unfinished runs and old checkpoints
    python scripts/runs.py export composed/first --runs.archive first.tar
    python scripts/runs.py import --runs.archive first.tar

Reads manifests below --run.data_dir and --run.models_dir. A base model is never removed and never carried.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config
from utils import cli

SECTIONS = ("runs", "run")
MOST_USED = ("runs.yes", "runs.older_than_days", "runs.archive", "run.data_dir", "run.models_dir")


def main(config: Config) -> dict[str, Any]:
    """Do what the first word says."""
    from utils.artifacts import run_list, run_removal, run_settings, run_tables, run_transfer
    from utils.exceptions import ConfigError, Problem

    section, roots = config.runs, (config.run.data_dir, config.run.models_dir)
    command = section.command
    if command == "import":
        return run_transfer.bring(_archive(config), *roots)
    listed = run_list.entries(*roots)
    if command in ("list", "best", "prune") and section.names:
        raise ConfigError(Problem(f"{command} is about every run: leave the names out", " ".join(section.names)))
    chosen = run_list.named(listed, section.names)
    if command == "list":
        print(run_tables.listing(listed))
        return {"runs": [entry.to_json() for entry in listed]}
    if command == "best":
        best_runs = run_list.best(listed)
        print(run_tables.table([(entry.name, entry.data, why) for entry, why in best_runs], ("run", "data", "why")))
        return {"best": [{**entry.to_json(), "why": why} for entry, why in best_runs]}
    if command == "prune":
        return _remove(config, run_removal.of_leftovers(listed, older_than_days=section.older_than_days))
    if not chosen or (command == "compare" and len(chosen) < 2) or (command in ("show", "export") and len(chosen) > 1):
        number = {"compare": "two or more runs", "rm": "the runs to remove"}.get(command, "one run")
        names = " ".join([*(entry.name for entry in chosen), *["STAGE/NAME"] * (1 + (command == "compare"))][:2])
        fix = f"python scripts/runs.py {command} {names}; python scripts/runs.py list shows the names"
        raise ConfigError(Problem(f"{command} needs {number}", fix=fix))
    if command == "rm":
        return _remove(config, run_removal.of_runs(chosen))
    if command == "export":
        return run_transfer.export(chosen[0], listed, _archive(config))
    if command == "show":
        print(run_tables.card(chosen[0]))
        return {**chosen[0].to_json(), "settings": chosen[0].settings, "manifest": dict(chosen[0].manifest)}
    print(run_tables.comparison(chosen))
    return {"runs": [e.to_json() for e in chosen], "differing": run_settings.differing(chosen)}


def _remove(config: Config, removals: list[Any]) -> dict[str, Any]:
    from utils.artifacts import run_removal

    for removal in removals:
        print("\n".join([removal.line(), *(f"  warning: {text}" for text in removal.warnings)]))
    if config.runs.yes:
        run_removal.remove(removals)
    elif removals:
        print("nothing was removed: add --yes")
    listed = [removal.to_json() for removal in removals]
    return {"removed" if config.runs.yes else "would_remove": listed}


def _archive(config: Config) -> Path:
    from utils.exceptions import ConfigError, Problem

    if not config.runs.archive:
        raise ConfigError(Problem(f"{config.runs.command} needs a file", fix="say which: --runs.archive FILE.tar"))
    return Path(config.runs.archive)


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    return [f"{config.runs.command} {' '.join(config.runs.names)}".strip()]


if __name__ == "__main__":
    cli.run(
        main,
        plan,
        sections=SECTIONS,
        most_used=MOST_USED,
        description=__doc__,
        argv=cli.words_as_flags(sys.argv[1:], "runs.command", "runs.names"),
        ranks="first",
    )
