"""Whether two commits are the same program: both run the pipeline from nothing, and what they made is compared.

    python tests/compare_commits.py OLD NEW           the toy, and ten steps of the embedded model: half an hour
    python tests/compare_commits.py --toy OLD NEW     the toy alone: ten minutes

Each commit is checked out into a temporary directory and run there, one after the other, with this interpreter, the
same threads, and data/ and models/ of its own. Compared are the columns of Arrow tables, and the digests of jsonl,
parquet and safetensors files, adapter and model configurations, the weight search, and `evaluate`'s numbers; never
manifests, times or paths. One line per artefact on standard output, progress on standard error.

Exit codes: 0 all equal, 1 something differs (or one of the two fails), 2 no such commit, 75 and 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow

ROOT = Path(__file__).resolve().parents[1]
BY_BYTES = {".jsonl", ".parquet", ".safetensors"}
BY_VALUE = {"adapter_config.json", "search.json", "interference.json"}
# what is no content: where things lie, how long they took, by which version, and sentences about numbers
NOT_CONTENT = {
    *("base_model_name_or_path", "_name_or_path", "tokens_per_second", "seconds", "answering_seconds"),
    *("peft_version", "transformers_version", "meaning", "claim", "reason", "label"),
}
PROVEN = ("verdict", "contrasts", "cells")
PINNED = ("--domain_adapter", "{domain}", "--task_adapter", "{task}")


@dataclass(frozen=True)
class Stage:
    """One script; {NAME} in its arguments is the directory of the artefact that an earlier stage made."""

    artefact: str
    script: str
    arguments: tuple[str, ...] = ()


def stages(*, of_compose: tuple[str, ...] = (), of_evaluate: tuple[str, ...] = (), search: bool) -> list[Stage]:
    """The pipeline in order."""
    found = [
        Stage("prepared", "prepare_data"),
        Stage("domain", "train_domain_adapter"),
        Stage("task", "train_task_adapter"),
        Stage("task_on_base", "train_task_adapter", ("--task.on", "base")),
        Stage("composed", "compose", (*PINNED, "--weights", "1,0.75", *of_compose)),
        Stage("merged", "inference", (*PINNED, "--merge_path", "{place}/merged")),
        Stage("evaluation", "evaluate", (*PINNED, *of_evaluate)),
    ]
    if search:  # last, or the merge and the evaluation would take what it found
        found.append(Stage("searched", "compose", (*PINNED, "--compose.search", *of_compose)))
    return found


TOY = ("--preset", "tiny_minimax_m2")
FROM_FILES = Stage("prepared_from_files", "prepare_data", ("--data.corpus", "{corpus}", "--data.task", "{pairs}"))
TEN_STEPS = (
    *("--data.max_documents", "120", "--data.max_train_examples", "120"),
    *("--data.max_dev_examples", "12", "--data.max_test_examples", "16"),
    *("--domain.train.max_steps", "10", "--domain.train.max_dev_tokens", "512"),
    *("--domain.train.batch_tokens", "512", "--domain.train.micro_batch_tokens", "512"),
    *("--task.train.max_steps", "10", "--task.train.max_dev_tokens", "512"),
    *("--task.train.batch_tokens", "512", "--task.train.micro_batch_tokens", "512", "--run.trackers", ""),
)
FEW_DEV = ("--compose.max_dev_items", "8", "--compose.max_dev_documents", "4")
FEW_TEST = (
    *("--evaluate.max_heldout_documents", "4", "--evaluate.generated_answers", "2"),
    *("--evaluate.resamples", "200", "--evaluate.max_new_tokens", "12"),
)
PIPELINES = {
    "toy": (TOY, [*stages(search=True), FROM_FILES]),
    "embedded": (TEN_STEPS, stages(of_compose=FEW_DEV, of_evaluate=FEW_TEST, search=False)),
}


# ------------------------------------------------------------------------------------------------------- running


def run_side(code: Path, place: Path, shared: dict[str, str], kinds: list[str], threads: int) -> dict[str, Path | str]:
    """Every artefact of one commit by name: its directory, or, where its script failed, what it said."""
    found: dict[str, Path | str] = {}
    for kind in kinds:
        flags, chain = PIPELINES[kind]
        root = place / kind
        roots = ("--run.data_dir", str(root / "data"), "--run.models_dir", str(root / "models"))
        made = {**shared, "place": str(root)}
        for stage in chain:
            name = f"{kind}: {stage.artefact}"
            begun = time.monotonic()
            try:
                words = [word.format_map(made) for word in (*flags, *roots, *stage.arguments)]
            except KeyError as missing:
                found[name] = f"{missing} is missing"
                continue
            result = run_script(code, stage.script, words, threads)
            say(f"{place.name}: {name}: {time.monotonic() - begun:.0f} s")
            if isinstance(result, str):
                found[name] = result
                continue
            directory = next(str(result[key]) for key in ("run", "composed", "merged") if key in result)
            made[stage.artefact] = directory
            found[name] = Path(directory)
        found[f"{kind}: base"] = root / "models" / "base"
    return found


def run_script(code: Path, script: str, words: list[str], threads: int) -> dict[str, Any] | str:
    """The JSON of its last line, or why there is none."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DTA_") and k not in launcher}
    done = subprocess.run(
        [sys.executable, f"scripts/{script}.py", *words],
        cwd=code,
        env=kept | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return f"{script} ended with {done.returncode}: {last}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_sources(directory: Path) -> dict[str, str]:
    """Documents of several formats and labelled pairs, for both commits alike."""
    corpus = directory / "corpus"
    corpus.mkdir(parents=True)
    for number in range(8):
        text = " ".join(f"Function f{number}_{word} returns {number * word} and raises {word}." for word in range(12))
        (corpus / f"{number}.txt").write_text(text)
        (corpus / f"{number}.md").write_text(f"# Title {number}\n\n{text[::2]}\n\n```\nx = {number}\n```\n")
        (corpus / f"{number}.html").write_text(f"<html><body><h1>H{number}</h1><p>{text[7:]} &amp; so on</p></body>")
    rows = [{"id": f"d{n}", "text": f"Row {n} is {n * n} long. " * (n + 3)} for n in range(12)]
    (corpus / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (corpus / "cells.csv").write_text("id,text\n" + "".join(f'c{n},"Cell {n}, of {n}"\n' for n in range(6)))
    pairs = [
        {"id": f"q{n}", "document": f"m{n // 2}", "question": f"What does f{n} do?", "answer": f"It returns {n}"}
        for n in range(48)
    ]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {"corpus": str(corpus), "pairs": str(directory / "pairs.jsonl")}


@contextlib.contextmanager
def checked_out(commit: str, directory: Path) -> Iterator[Path]:
    """A git worktree of this commit, removed at the end."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(directory), commit], cwd=ROOT, check=True)
    try:
        yield directory
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(directory)], cwd=ROOT, check=True)


# ----------------------------------------------------------------------------------------------------- comparing


def contents(directory: Path) -> dict[str, str]:
    """Digest of each piece of content below an artefact's directory, by relative name."""
    found: dict[str, str] = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        if path.suffix == ".arrow":
            found |= {f"{name} {column}": digest for column, digest in columns(path).items()}
        elif path.name == "metrics.jsonl":
            found[name] = of_value([json.loads(line) for line in path.read_text().splitlines()])
        elif path.suffix in BY_BYTES:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name in BY_VALUE or (path.name == "config.json" and (path.parent / "tokenizer.json").exists()):
            found[name] = of_value(json.loads(path.read_text()))
        elif path.name == "results.json":
            results = json.loads(path.read_text())
            found |= {f"{name} {key}": of_value(results.get(key)) for key in PROVEN}
    return found


def columns(path: Path) -> dict[str, str]:
    """Digest of each column's type and values; the file's bytes also hold how its batches were cut."""
    with pyarrow.memory_map(str(path)) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
    return {field.name: of_value([str(field.type), table[field.name].to_pylist()]) for field in table.schema}


def of_value(value: Any) -> str:
    """Digest of a JSON value without what is no content."""

    def content(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: content(inner) for key, inner in part.items() if key not in NOT_CONTENT}
        return [content(inner) for inner in part] if isinstance(part, list) else part

    return hashlib.sha256(json.dumps(content(value), sort_keys=True, default=str).encode()).hexdigest()


def difference(old: Path | str, new: Path | str) -> tuple[str, int]:
    """What differs between two artefacts, empty when nothing does; and the number of pieces that were compared."""
    failed = [f"in {side}, {one}" for side, one in (("OLD", old), ("NEW", new)) if isinstance(one, str)]
    if failed or isinstance(old, str) or isinstance(new, str):
        return "; ".join(failed), 0
    before, after = contents(old), contents(new)
    if not before and not after:
        return "nothing to compare", 0
    found = [f"{name} only in OLD" for name in before.keys() - after.keys()]
    found += [f"{name} only in NEW" for name in after.keys() - before.keys()]
    found += [name for name in before.keys() & after.keys() if before[name] != after[name]]
    return ", ".join(sorted(found)), len(before)


def main(arguments: list[str]) -> int:
    """Run both, print a line per artefact; 0 when all are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="commit, branch or tag")
    parser.add_argument("new", help="commit, branch or tag")
    parser.add_argument("--toy", action="store_true", help="only the toy pipeline")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of every script")
    given = parser.parse_args(arguments)
    commits = {"OLD": given.old, "NEW": given.new}
    for side, commit in commits.items():
        asked = ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            parser.error(f"no such commit: {commit}")
        commits[side] = done.stdout.strip()
    kinds = ["toy"] if given.toy else list(PIPELINES)
    equal = True
    with tempfile.TemporaryDirectory(prefix="compare-commits-") as scratch:
        shared = write_sources(Path(scratch) / "shared")
        made = {}
        for side, commit in commits.items():
            say(f"{side}: {commit[:7]} on {given.threads} threads")
            with checked_out(commit, Path(scratch) / "code") as code:
                made[side] = run_side(code, Path(scratch) / side, shared, kinds, given.threads)
        for name, old in made["OLD"].items():
            differs, pieces = difference(old, made["NEW"][name])
            equal = equal and not differs
            print(f"{name}: differs: {differs}" if differs else f"{name}: equal ({pieces} pieces)", flush=True)
    print(json.dumps({"equal": equal, "old": commits["OLD"], "new": commits["NEW"], "artefacts": len(made["OLD"])}))
    return 0 if equal else 1


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _stopped(number: int, frame: object) -> None:
    raise SystemExit(75)  # as the scripts end; what `with` holds is removed on the way


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stopped)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
