"""The files of a merged model, split over the ranks; each rank records what it has finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from utils.artifacts import files, resumable
from utils.export import merged_tensors
from utils.export.merge_plan import Plan
from utils.logger import event
from utils.models.parallel import ranks, work
from utils.models.weights import safetensors_io
from utils.progress import Progress

# what is finished, while a merge is being written; hidden, so no part of the artefact
RECORD = ".shards.json"
RECORD_OF_RANK = ".shards-{rank}.json"


def finished(plan: Plan, directory: Path) -> dict[str, dict[str, Any]]:
    """The record of an interrupted merge of any number of ranks, as far as the files are still what it says.

    It is kept in one file from here on.
    """
    paths = [directory / RECORD, *sorted(directory.glob(RECORD_OF_RANK.format(rank="*")))]
    records = [record for path in paths if (record := resumable.read(path, directory.name)) is not None]
    if not records:
        return {}
    event("going on with an interrupted merge: checking its finished files")
    record = {
        name: done
        for record in records
        for name, done in record.items()
        if (directory / name).is_file()
        and (directory / name).stat().st_size == done["bytes"] == plan.outputs[name].size
        and files.sha256_file(directory / name) == done["sha256"]
    }
    if record:
        resumable.write(directory / RECORD, record, directory.name)
    return record


def write(
    plan: Plan, directory: Path, todo: Sequence[str], before: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """On every rank at once: each writes its share of the files `todo`, and keeps a record of its own.

    Returns, on all of them, file name -> sha256, bytes and the changed tensors' squared norms. Raises NonFiniteError
    when a merged weight is not finite.
    """
    paths = {path.name: path for path in plan.checkpoint.headers}
    rank, is_alone = ranks.index(), ranks.size() == 1
    record = dict(before) if rank == 0 else {}
    own = directory / (RECORD if rank == 0 else RECORD_OF_RANK.format(rank=rank))
    done = sum(entry["bytes"] for entry in before.values())
    with (
        Progress("merging", total=plan.size, unit="B", done=done) as bar,
        safetensors_io.one_thread(),
        safetensors_io.one_more_thread() as thread,
    ):

        def written(file: str) -> dict[str, Any]:
            squares: dict[str, list[float]] = {}
            header = plan.outputs[file]
            content = partial(merged_tensors.content, plan, paths[file], squares)
            advance = bar.advance if is_alone else _nothing
            digest = safetensors_io.write(directory / file, header, content, advance, thread)
            record[file] = {"sha256": digest, "bytes": header.size, "squares": squares}
            resumable.write(own, record, directory.name)
            return record[file]

        sizes = [plan.outputs[file].size for file in todo]
        entries = work.computed(todo, sizes, written, None if is_alone else bar, sizes, in_step=False)
    return dict(zip(todo, entries, strict=True))


def _nothing(amount: float) -> None:
    """For progress that is told by the file."""
