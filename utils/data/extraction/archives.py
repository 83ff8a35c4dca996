"""ZIP archives and the XML inside, of anybody's making: not unpacked beyond a limit, no entities, no network."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from utils.data.extraction.extracted import NoTextError

# of a file with its pictures; a few KB can hold gigabytes of zeros
LARGEST_ARCHIVE = 1 << 30


def open_archive(path: Path) -> zipfile.ZipFile:
    """An office file or book as a ZIP archive. Raises NoTextError if it is none or unpacks to too much."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        if path.read_bytes()[:8] == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
            raise NoTextError(
                "it is encrypted, or of the binary format before 2007; save it anew without a password"
            ) from error
        raise NoTextError(f"it is damaged ({error})") from error
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > LARGEST_ARCHIVE:
        archive.close()
        raise NoTextError(f"it unpacks to {unpacked:,} bytes, more than {LARGEST_ARCHIVE:,}")
    return archive


def parse_xml(content: bytes) -> Any:
    """The root element. Raises NoTextError for what is no XML."""
    from lxml import etree

    parser = etree.XMLParser(resolve_entities=False, no_network=True, remove_comments=True, remove_pis=True)
    try:
        return etree.fromstring(content, parser)
    except etree.XMLSyntaxError as error:
        raise NoTextError(f"a part of it is no XML ({error})") from error
