"""The reading of documents as a step of a datatrove pipeline, for more files than one machine reads.

Each task reads its share of a folder's files and writes parquet with `id` and `text`, which `--data.corpus` reads;
duplicates between tasks are dropped there. docs/data.md shows the pipeline.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.data.corpus.first_look import files_below
from utils.data.corpus.read_report import printable_path
from utils.data.extraction.extracted import NoTextError
from utils.data.extraction.formats import FILE_SUFFIXES
from utils.data.extraction.pool import ExtractionPool

logger = logging.getLogger(__name__)


class FolderReader:
    """`LocalPipelineExecutor([FolderReader("my_documents"), ParquetWriter("extracted")], tasks=8)`."""

    def __init__(self, folder: str, *, file_seconds: float = 60, file_memory_mb: int = 2048):
        self.folder, self.file_seconds, self.file_memory_mb = folder, file_seconds, file_memory_mb

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """The documents of every `world_size`-th file, from the `rank`-th on; what cannot be read is logged."""
        from datatrove.data import Document

        root = Path(self.folder).expanduser()
        files = [path for path in files_below(root, _complain) if path.suffix.lower() in FILE_SUFFIXES]
        with ExtractionPool(1, seconds=self.file_seconds, memory_bytes=self.file_memory_mb * 2**20) as pool:
            for path in files[rank::world_size]:
                name = printable_path(path.relative_to(root))
                try:
                    extracted = pool.result(pool.submit(path))
                except (NoTextError, OSError) as error:
                    logger.warning("%s: %s", name, error)
                    continue
                for part, text in extracted.documents:
                    if text.strip():
                        yield Document(text=text, id=f"{name}#{part}" if part else name)


def _complain(error: OSError) -> None:
    logger.warning("%s: cannot be listed: %s", error.filename, error.strerror)
