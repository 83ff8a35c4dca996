"""Can this be trusted? Checks an artefact and everything it was made from, down to the base model; writes nothing.

Reads a run (data, adapter, composition, evaluation, benchmark), its adapter folder, a checkpoint, a merged or base
model, or an adapter folder of another tool; hashes every file, finds the parents by digest under --run.data_dir and
--run.models_dir. Problems come one a line, then the verdict in one line; exit code 0 or 2. Of a base model it also says
what works: every stage is tried on some of its layers.

    python scripts/verify.py models/merged_model
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config
from utils import cli

SECTIONS = ("verify", "run")
MOST_USED = ("verify.path", "run.data_dir", "run.models_dir")


def main(config: Config) -> dict[str, Any]:
    """Verify, say what is wrong, say the verdict."""
    from utils.exceptions import ConfigError, Problem
    from utils.export import model_support, verification
    from utils.models import sources

    if not config.verify.path:
        raise ConfigError(Problem("nothing to verify", fix="python scripts/verify.py PATH"))
    verdict = verification.verify(Path(config.verify.path), (config.run.data_dir, config.run.models_dir))
    problems = [" ".join(str(problem).split()) for problem in verdict.problems]
    for line in (
        *(f"note: {note}" for note in verdict.notes),
        *(f"problem: {text}" for text in problems),
        verdict.line(),
    ):
        print(line)
    support: dict[str, str] = {}
    if verdict.kind == "model" and verdict.trusted:
        section = config.base.model_copy(update={"source": config.verify.path, "revision": ""})
        own = config.model_copy(update={"base": section})
        support = model_support.row(own, sources.fetch(section, config.run.models_dir))
        print("\n".join(f"{column:<16} {result}" for column, result in support.items()))
    return {
        "path": config.verify.path,
        "kind": verdict.kind,
        **({"support": support} if support else {}),
        "trusted": verdict.trusted,
        "checked": verdict.checked,
        "problems": problems,
        "notes": verdict.notes,
    }


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.planning import dry_run

    return [
        *dry_run.lines(config, "verify"),
        f"hash every file of {config.verify.path or 'PATH'} and compare it with its manifest",
        f"do the same for all it was made from, under {config.run.data_dir} and {config.run.models_dir}",
        "for a base model try every stage on some of its layers, in float32",
        "write nothing",
    ]


if __name__ == "__main__":
    cli.run(
        main,
        plan,
        sections=SECTIONS,
        most_used=MOST_USED,
        description=__doc__,
        argv=cli.words_as_flags(sys.argv[1:], "verify.path"),
        status=lambda result: 0 if result["trusted"] else 2,
        ranks="first",
    )
