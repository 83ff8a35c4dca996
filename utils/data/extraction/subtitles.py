"""What is said in subtitles (.srt, .vtt): the times and numbers of the lines, and marks of their look, are left out."""

from __future__ import annotations

import html
import re
from collections import Counter
from pathlib import Path

from utils.data.extraction.extracted import Extracted, NoTextError, visible_characters
from utils.data.extraction.text_decoding import decode

TIMES, REPEATED, LOOKS = "times of subtitles", "repeated lines of subtitles", "comments and styles of subtitles"
_TIMES = re.compile(r"\s*(?:\d+:)?\d+:\d\d[.,]\d+\s*-->")
_ASIDE = re.compile(r"(?:\ufeff)?(?:WEBVTT|NOTE|STYLE|REGION|X-TIMESTAMP)\b")
_VOICE = re.compile(r"<v(?:\.[^ >]+)*\s+([^<>\n]+)>")
_MARKS = re.compile(r"</?[A-Za-z][^<>\n]*>|<[\d:.]+>|\{\\an?\d+\}")


def extract_subtitles(path: Path) -> Extracted:
    """The lines that are said, in their order; automatic captions repeat a line while the next one is said: once."""
    text, _ = decode(path.read_bytes())
    removed: Counter[str] = Counter()
    captions: list[str] = []
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.split("\n")
        at = next((number for number, line in enumerate(lines) if _TIMES.match(line)), -1)
        if at < 0 and _ASIDE.match(block.lstrip()):
            removed[LOOKS] += visible_characters(block)
            continue
        removed[TIMES] += visible_characters("".join(lines[: at + 1]))
        for line in lines[at + 1 :]:
            plain = _MARKS.sub("", _VOICE.sub(r"\1: ", line))
            removed[LOOKS] += visible_characters(line) - visible_characters(plain)
            plain = html.unescape(plain).strip()
            if plain and captions and plain == captions[-1]:
                removed[REPEATED] += visible_characters(plain)
            elif plain:
                captions.append(plain)
    if not captions:
        raise NoTextError("the subtitles have no text")
    whole = "\n".join(captions)
    return Extracted.whole(whole, visible=visible_characters(whole) + removed.total(), removed=removed)
