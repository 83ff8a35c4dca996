r"""LaTeX macros that a file defines for itself, written out: `\newcommand{\be}{\begin{equation}}` and its kind.

pylatexenc reads markup and runs no program: half an environment in a definition would end its reading there.
"""

from __future__ import annotations

import re

_DEFINITION = re.compile(
    r"\\(?:re|provide)?newcommand\*?\s*\{?\s*\\([A-Za-z]+)\s*\}?\s*(?:\[(\d)\])?(\s*\[)?|\\def\s*\\([A-Za-z]+)\s*(?=\{)"
)
# passes over the text, for macros in the bodies of others; and how much longer than the file a text may become
_PASSES, _LONGEST = 5, 4


def written_out(source: str) -> str:
    """The text without these definitions, and what they define in place of its names. Definitions of another form, and
    macros that would make the text four times as long, stay as they are."""
    rest, macros = _definitions(source)
    text = rest
    for _ in range(_PASSES if macros else 0):
        before, text = text, _replaced(text, macros)
        if len(text) > _LONGEST * len(source) + 1000:
            return source
        if text == before:
            break
    return text


def with_whole_addresses(source: str) -> str:
    """The text with every `%` in the address of a link escaped: there it begins no comment."""
    kept, at = [], 0
    for found in re.finditer(r"\\(?:href|url|nolinkurl)(?![A-Za-z])", source):
        if found.start() >= at and (group := _group(source, found.end())) is not None:
            address = re.sub(r"(?<!\\)%", r"\\%", group[0])
            kept += [source[at : found.end()], f"{{{address}}}"]
            at = group[1]
    return "".join([*kept, source[at:]])


def _definitions(source: str) -> tuple[str, dict[str, tuple[int, str | None, str]]]:
    """(text without them, name -> number of arguments, the first one's usual value, body)."""
    macros: dict[str, tuple[int, str | None, str]] = {}
    kept, at = [], 0
    for found in _DEFINITION.finditer(source):
        if found.start() < at or _is_commented(source, found.start()):
            continue
        end, usual = found.end(), None
        if found[3]:
            close = source.find("]", end)
            usual, end = source[end:close], close + 1
            if close < 0:
                continue
        if (body := _group(source, end)) is None:
            continue
        name = found[1] or found[4]
        if not re.search(rf"\\{name}(?![A-Za-z@])", body[0]):  # one that names itself would never end
            macros[name] = (int(found[2] or 0), usual, body[0])
            kept.append(source[at : found.start()])
            at = body[1]
    return "".join([*kept, source[at:]]), macros


def _replaced(text: str, macros: dict[str, tuple[int, str | None, str]]) -> str:
    names = "|".join(map(re.escape, sorted(macros, key=len, reverse=True)))
    kept, at = [], 0
    for found in re.finditer(rf"\\({names})(?![A-Za-z@])", text):
        if found.start() < at:
            continue
        count, usual, body = macros[found[1]]
        arguments, end = [], found.end()
        if usual is not None:
            given = re.compile(r"\s*\[([^\[\]]*)\]").match(text, end)
            arguments, end = [given[1] if given else usual], given.end() if given else end
        while len(arguments) < count and (group := _group(text, end)) is not None:
            arguments, end = [*arguments, group[0]], group[1]
        if len(arguments) < count:
            continue
        if not count:  # what ends the name is no text: \pump{} or a blank
            end += len(re.compile(r"\{\}|[ \t]*").match(text, end)[0])  # type: ignore[index]
        for number, argument in enumerate(arguments, 1):
            body = body.replace(f"#{number}", argument)
        kept += [text[at : found.start()], body]
        at = end
    return "".join([*kept, text[at:]])


def _group(text: str, at: int) -> tuple[str, int] | None:
    """(what stands in the braces that open here, behind blanks; where they have ended)."""
    start = re.compile(r"\s*\{").match(text, at)
    depth, place = 1, start.end() if start else len(text)
    begin = place
    while place < len(text):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[begin:place], place + 1
        place += 2 if text[place] == "\\" else 1
    return None


def _is_commented(text: str, at: int) -> bool:
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return bool(re.search(r"(?<!\\)%", line))
