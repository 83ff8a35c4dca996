"""Speed and memory: base, two active, composed, merged on the same prompts; training; data; merging; evaluation; GPU.

Reads the newest task run and its domain run (random adapters of that shape when there are none); writes
models/benchmark/<run>/ with results.json, summary.txt and a plot per suite. Interrupted, it goes on at the next suite.
Measure on a machine that does nothing else: the ratios survive a loaded one, the times do not.

    python scripts/benchmark.py --benchmark.suite inference,training,data,merge,evaluation
    python scripts/benchmark.py --preset tiny_minimax_m2 --benchmark.suite gpu --plan.gpu_tflops 989
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config, run_label, with_row_tokens
from utils import cli

SECTIONS = ("benchmark", "compose", "domain", "inputs", "base", "plan", "run")
MOST_USED = ("benchmark.suite", "benchmark.repeats")


def main(config: Config) -> dict[str, Any]:
    """Find the adapters, run the suites that were asked for, write down, show."""
    from utils import logger
    from utils.artifacts import files, runs
    from utils.benchmarks import benchmark_report, inputs, suite_gpu, suites
    from utils.benchmarks.benchmark_identity import benchmark_identity
    from utils.exceptions import ConfigError, Problem
    from utils.models.parallel import sharding
    from utils.planning import preflight

    config = with_row_tokens(config)  # random tokens have no length of their own
    if config.base.quantization != "none":
        what = "the suites measure a base whose weights they merge and copy; in 4 or 8 bits they cannot"
        raise ConfigError(Problem(what, f"--base.quantization {config.base.quantization}", "leave it out"))

    if "gpu" in config.benchmark.suite:
        suite_gpu.refuse(config)
    suites.refuse_sharded(config)
    base = preflight.start(config)
    pair = inputs.adapter_runs(config, base) if "inference" in config.benchmark.suite else None
    identity = benchmark_identity(config, base, pair)
    directory = runs.directory_for(config.run.models_dir, "benchmark", config.run.name, run_label(config), identity)

    def fill() -> dict[str, Any]:
        results = suites.measure(config, base, pair, directory)
        files.write_json(directory / "results.json", results)
        files.write_text(directory / "summary.txt", benchmark_report.table(results) + "\n")
        benchmark_report.write_plots(results, directory / "plots.html")
        parents, machine = list(pair) if pair else [], results["machine"]
        return runs.manifest(
            "benchmark", identity, base=base.record(), parents=parents, measured=machine, **sharding.loaded()
        )

    _, is_there = runs.make(directory, identity, "the benchmark", fill)
    if is_there:
        logger.event("this benchmark is already complete; give it another --run.name to repeat it", path=directory)
    results = files.read_json(directory / "results.json")
    runs.mark_latest(config.run.models_dir, "benchmark", directory)
    print(benchmark_report.table(results))
    return {"report": str(directory), "reused": is_there, **benchmark_report.headline(results)}


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.planning import dry_run

    section = config.benchmark
    what = {
        "inference": f"answer prompts of {section.prompt_tokens} tokens in batches of {section.batch_sizes} with base, "
        f"two active, composed and merged, {section.repeats} times each in turn",
        "training": f"train on {section.training_tokens:,} tokens with our loop, a plain one, and TRL if it is there",
        "data": f"prepare synthetic corpora of {', '.join(map(str, section.corpus_megabytes))} MB and remove them",
        "merge": f"build a synthetic checkpoint of {section.merge_gigabytes:g} GB, copy and merge it, and remove all",
        "evaluation": f"score {section.evaluation_items} test questions and {section.evaluation_document_tokens:,} "
        "tokens of documents with our evaluation, and with lm-eval if it is there",
        "gpu": "train as many layers of a random MiniMax-M2 as fit, with attention and with expert adapters, then "
        "train, compose, merge and ask a random dense model" + (" (at toy size)" if section.gpu_toy else ""),
    }
    target = config.run.models_dir / "benchmark" / (config.run.name or f"{run_label(config)}-<fingerprint>")
    size = dry_run.lines(config, "benchmark")
    return [*size, *(what[suite] for suite in section.suite), f"write {target}/results.json, summary.txt and plots"]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__)
