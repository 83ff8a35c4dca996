r"""LaTeX macros that a file defines for itself, written out: `\newcommand{\be}{\begin{equation}}` and its kind.

pylatexenc reads markup and runs no program: half an environment in a definition would end its reading there.
"""

from __future__ import annotations

import re

_DEFINITION = re.compile(
    r"\\(?:re|provide)?newcommand\*?\s*\{?\s*\\([A-Za-z]+)\s*\}?\s*(?:\[(\d)\])?(\s*\[)?|\\def\s*\\([A-Za-z]+)\s*(?=\{)"
)
# passes over the text, for macros in the bodies of others; and how much longer than the file a text may become
_PASSES, _LONGEST = 10, 4
# characters of a body, an argument or an address
_LONGEST_GROUP, _LONGEST_LINE = 20_000, 500
# an escaped character is none, nor is what stands in a comment; an address has no comments
_BRACE, _BLANKS = re.compile(r"\\.|%[^\n]*|[{}]", re.DOTALL), re.compile(r"\s*")
_BRACE_OF_ADDRESS = re.compile(r"\\.|[{}]", re.DOTALL)


def written_out(source: str) -> str:
    """The text without these definitions, and what they define in place of its names.

    As it is where that would make it four times as long, or where macros are in macros ten times over.
    """
    rest, macros = _definitions(source)
    text = rest
    longest = _LONGEST * len(source) + 1000
    for _ in range(_PASSES if macros else 0):
        before, text = text, _replaced(text, macros, longest)
        if len(text) > longest:
            return source
        if text == before:
            return text
    return source if macros else rest


def with_whole_addresses(source: str) -> str:
    """The text with every `%` in the address of a link escaped: there it begins no comment."""
    kept, at, groups = [], 0, _Braces(source, _BRACE_OF_ADDRESS)
    for match in re.finditer(r"\\(?:href|url|nolinkurl)(?![A-Za-z])", source):
        if match.start() >= at and (group := groups.at(match.end())) is not None:
            address = re.sub(r"(?<!\\)%", r"\\%", group[0])
            kept += [source[at : match.end()], f"{{{address}}}"]
            at = group[1]
    return "".join([*kept, source[at:]])


def _definitions(source: str) -> tuple[str, dict[str, tuple[int, str | None, str]]]:
    """(text without them, name -> number of arguments, the first one's usual value, body)."""
    macros: dict[str, tuple[int, str | None, str]] = {}
    kept, at, groups = [], 0, _Braces(source)
    for match in _DEFINITION.finditer(source):
        if match.start() < at or _is_commented(source, match.start()):
            continue
        end, usual = match.end(), None
        if match[3]:
            close = source.find("]", end)
            usual, end = source[end:close], close + 1
            if close < 0:
                continue
        if (body := groups.at(end)) is None:
            continue
        name = match[1] or match[4]
        if not re.search(rf"\\{name}(?![A-Za-z@])", body[0]):  # one that names itself would never end
            macros[name] = (int(match[2] or 0), usual, body[0])
            kept.append(source[at : match.start()])
            at = body[1]
    return "".join([*kept, source[at:]]), macros


def _replaced(text: str, macros: dict[str, tuple[int, str | None, str]], longest: int) -> str:
    names = "|".join(map(re.escape, sorted(macros, key=len, reverse=True)))
    kept, at, length, groups = [], 0, 0, _Braces(text)
    for match in re.finditer(rf"\\({names})(?![A-Za-z@])", text):
        if match.start() < at or length > longest:
            continue
        count, usual, body = macros[match[1]]
        arguments, end = [], match.end()
        if usual is not None:
            given = re.compile(r"\s*\[([^\[\]]*)\]").match(text, end)
            arguments, end = [given[1] if given else usual], given.end() if given else end
        while len(arguments) < count and (group := groups.at(end)) is not None:
            arguments, end = [*arguments, group[0]], group[1]
        if len(arguments) < count:
            continue
        if not count:  # what ends the name is no text: \pump{} or a blank
            end += len(re.compile(r"\{\}|[ \t]*").match(text, end)[0])  # type: ignore[index]
        for number, argument in enumerate(arguments, 1):
            body = body.replace(f"#{number}", argument)
        kept += [text[at : match.start()], body]
        length += len(kept[-1]) + len(kept[-2])
        at = end
    return "".join([*kept, text[at:]])


class _Braces:
    """The braces of a text and their partners, found in one pass: a file may open a million and close none."""

    def __init__(self, text: str, brace: re.Pattern[str] = _BRACE):
        self._text, self._ends, opened = text, dict[int, int](), list[int]()
        for match in brace.finditer(text):
            if match[0] == "{":
                opened.append(match.start())
            elif match[0] == "}" and opened:
                self._ends[opened.pop()] = match.start()

    def at(self, place: int) -> tuple[str, int] | None:
        """(what stands in the braces that open here, behind blanks; where they have ended)."""
        start = _BLANKS.match(self._text, place).end()  # type: ignore[union-attr]
        if (end := self._ends.get(start)) is None or end - start > _LONGEST_GROUP:
            return None
        return self._text[start + 1 : end], end + 1


def _is_commented(text: str, at: int) -> bool:
    before = text[max(0, at - _LONGEST_LINE) : at]
    line = before[before.rfind("\n") + 1 :]
    return bool(re.search(r"(?<!\\)%", line))
