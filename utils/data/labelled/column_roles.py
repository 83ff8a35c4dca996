"""What a column of labelled pairs is for, by its name or by what the person says with `--data.columns`. Pure.

A `Row` hands out values by role and remembers which column was read as what, so that the rest can be named.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from utils.data.labelled.row_text import RowError, is_missing, normal

Family = tuple[str, ...]
# in other languages: of two that are filled, also of two of these, neither is the likelier
_QUESTION = ("frage", "pregunta", "domanda", "pergunta", "vraag")
_QUESTION += ("问题", "問題", "質問", "вопрос", "질문", "السؤال", "pytanie", "soru", "fråga", "spørgsmål", "spørsmål")
_QUESTION += ("kysymys", "otázka", "питання", "kérdés", "întrebare", "ερώτηση", "שאלה", "سوال", "سؤال", "pertanyaan")
_QUESTION += ("câu_hỏi", "คำถาม", "प्रश्न")
_ANSWER = ("antwort", "réponse", "reponse", "respuesta", "risposta", "resposta")
_ANSWER += ("antwoord", "答案", "回答", "ответ", "답변", "정답", "الجواب", "odpowiedź", "cevap", "svar")
_ANSWER += ("vastaus", "odpověď", "відповідь", "válasz", "răspuns", "απάντηση", "תשובה", "پاسخ", "جواب", "jawaban")
_ANSWER += ("câu_trả_lời", "คำตอบ", "उत्तर")
_CONTEXT = ("kontext", "contexte", "contexto", "contesto", "上下文", "文脈", "контекст")
# role -> families of names. In a family the first filled one counts; two filled families are a question to the person
STRONG: dict[str, tuple[Family, ...]] = {
    "question": (
        ("question", "question_text", "question_stem"),
        _QUESTION,
        ("prompt", "user_prompt"),
        ("query", "user_query"),
        ("problem", "problem_statement"),
    ),
    "answer": (
        ("answers", "answer", "answer_text", "final_answer"),
        _ANSWER,
        ("correct_answers", "best_answer", "correct_answer", "right_answer", "gold_answer", "ground_truth"),
        ("expected_output", "expectedoutput", "expected_answer", "reference_answer", "ideal", "ground_truths"),
        ("response", "responses", "assistant_response", "model_response"),
        ("output", "outputs"),
        ("completion", "completions"),
        ("solution", "solutions"),
    ),
    "context": (
        ("context", "contexts"),
        _CONTEXT,
        ("passage", "passages", "passage_text"),
        ("paragraph", "paragraphs"),
    ),
    "system": (("system", "system_prompt", "system_message", "sys_prompt", "systeminstruction", "system_instruction"),),
    "history": (("history", "chat_history", "conversation_history"),),
    "messages": (
        ("messages",),
        ("conversations", "conversation"),
        ("dialogue", "dialog"),
        ("chat",),
        ("turns",),
        ("contents",),
        ("items",),
    ),
    "reasoning": (("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "cot", "chain_of_thought"),),
    "tools": (("tools", "functions"),),
    "id": (("id",),),
}
# looked at only where no strong one is filled
WEAK: dict[str, tuple[Family, ...]] = {
    "question": (
        ("instruction", "instructions"),
        ("input", "inputs"),
        ("user", "human", "user_input", "user_message"),
        ("stem",),
    ),
    "answer": (
        ("target", "targets", "target_text"),
        ("reply",),
        ("assistant", "gpt", "bot"),
        ("answers_spans",),
        ("reference",),
    ),
    "context": (
        ("background",),
        ("article",),
        ("story",),
        ("support",),
        ("retrieved_contexts", "ctxs", "reference_contexts"),
    ),
}
# beside one of these `reference` is the right answer, and what stands in them may be a model's
_MAYBE_A_MODELS = ("response", "responses", "assistant_response", "model_response")
# what says who speaks, in a turn of a conversation
ROLE_KEYS = ("role", "from", "speaker", "author")
# what Kahoot and its kind write behind a column's name
_HINT = re.compile(r"\s+[-–—]\s+(?:max|choose|select|optional|required)\b.*", re.DOTALL)
_OTHER_LANGUAGES = (_QUESTION, _ANSWER, _CONTEXT)
# names that other lists have, too: a conversation is seen by its turns
_MAYBE_TURNS = ("contents", "items")
# roles that several columns together may have, joined; the others have one
JOINED = ("question", "context", "system", "choices")
# what --data.columns may say, in other words
ALIASES = {"answers": "answer", "group": "document", "options": "choices", "conversations": "messages"}


def column_name(name: object) -> str:
    """A column's name as it is compared: small letters, one underscore for blanks, dots and dashes.

    What forms say of a column is left out ("Answer 1 - max 75 characters"), and "answer(s)" is "answers".
    """
    plain = unicodedata.normalize("NFC", str(name)).strip().strip("\ufeff").lower()
    return re.sub(r"[\s.\-/]+", "_", _HINT.sub("", plain).replace("(s)", "s"))


def has_name_of(role: str, column: str) -> bool:
    """Whether a column's name has one of the role's own in it, as `kundenfrage` and `reply_text` have."""
    return role in column or any(name in column for family in STRONG.get(role, ()) for name in family if len(name) > 3)


def are_turns(value: object) -> bool:
    """Whether a value is a conversation: a list of objects that say who speaks."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and any(turn.get(key) for key in ROLE_KEYS) for turn in value)
    )


class ColumnMap:
    """`--data.columns` of one run: role -> the columns that have it, and the columns that are to be ignored."""

    def __init__(self, entries: Sequence[str] = ()):
        self.columns: dict[str, list[str]] = {}
        self.ignored: set[str] = set()
        for item in entries:
            role, _, column = item.partition("=")
            role = ALIASES.get(role.strip(), role.strip())
            if role == "ignore":
                self.ignored.add(column_name(column))
            else:
                self.columns.setdefault(role, []).append(column_name(column))

    def missing(self, seen: Iterable[str]) -> list[str]:
        """Columns that were said and are in no row."""
        named_columns = [column for columns in self.columns.values() for column in columns] + sorted(self.ignored)
        return [column for column in named_columns if column not in set(seen)]


class Row:
    """The columns of one row; `used` is column -> role of those that were read."""

    def __init__(self, values: Mapping[str, Any], column_map: ColumnMap | None = None):
        self.column_map = column_map or ColumnMap()
        self.values: dict[str, Any] = {}
        self.used: dict[str, str] = {}
        self.notes: list[str] = []
        for name, value in values.items():
            key = column_name(name)
            if key in self.values and not (is_missing(value) or is_missing(self.values[key])):
                raise RowError("two columns have the same name but for case", key, "rename one", of_file=True)
            if key not in self.values or not is_missing(value):
                self.values[key] = value
        self._claimed = {c for columns in self.column_map.columns.values() for c in columns} | self.column_map.ignored

    def has(self, *names: str) -> bool:
        """Whether any of these columns is filled and free."""
        return any(not is_missing(self.peek(name)) for name in names)

    def peek(self, name: str) -> Any:
        """A column's value without using it; None for one that the person gave another role."""
        return None if name in self._claimed else self.values.get(name)

    def take(self, name: str, role: str) -> Any:
        """A column's value, used as this role; None where it is not there."""
        value = self.peek(name)
        if not is_missing(value):
            self.used[name] = role
        return value

    def filled(self, role: str) -> list[str]:
        """The columns that could have this role: those the person named, else the first filled one of each family."""
        if role in self.column_map.columns:
            return [column for column in self.column_map.columns[role] if not is_missing(self.values.get(column))]
        for families in (STRONG.get(role, ()), WEAK.get(role, ())):
            columns: list[str] = []
            for family in families:
                filled = [n for n in family if n in self.values and self.has(n) and self._may_be(role, n)]
                columns += filled if family in _OTHER_LANGUAGES else filled[:1]
            if columns:
                is_asked = role == "answer" and set(columns) <= set(_MAYBE_A_MODELS) and self.has("reference")
                return [*columns, *(["reference"] if is_asked else [])]
        return []

    def _may_be(self, role: str, name: str) -> bool:
        """Whether the value can have this role: `turns` may be a number of turns, `support` one of votes."""
        value = self.values[name]
        if role == "messages" and name in _MAYBE_TURNS:
            return are_turns(value)
        if role == "messages":
            is_list = isinstance(value, (list, dict)) or str(value).lstrip().startswith(("[", "{"))
            return is_list or (name == "messages" and isinstance(value, str))
        return role != "context" or isinstance(value, (str, list, dict))

    def is_named(self, role: str) -> bool:
        """Whether a column of this role is there, filled or not."""
        families = (*STRONG.get(role, ()), *WEAK.get(role, ()))
        names = self.column_map.columns.get(role) or [n for family in families for n in family]
        return any(name in self.values for name in names)

    def role_of(self, name: str) -> str | None:
        """The role that a column has by its name or by what the person said; None for any other."""
        for role, columns in self.column_map.columns.items():
            if name in columns:
                return role
        known = {**STRONG, **{role: (*STRONG[role], *families) for role, families in WEAK.items()}}
        return next((role for role, families in known.items() if any(name in f for f in families)), None)

    def value(self, role: str) -> Any:
        """The value of a role. Raises RowError when two columns that differ could have it."""
        names = self.filled(role)
        for name in names:
            self.used[name] = role
        if role in self.column_map.columns:
            if role in JOINED and len(names) > 1:
                return [self.values[name] for name in names]
            return self.values[names[0]] if names else None
        if self._differ(names):
            # of all roles, so that one command says it
            mappings = [f"{role}={names[0]}"]
            mappings += [
                f"{other}={many[0]}"
                for other in ("question", "answer", "context")
                if other != role and other not in self.column_map.columns and self._differ(many := self.filled(other))
            ]
            what = f"{len(names)} columns could be the {role}: {', '.join(names)}"
            fix = f"say which: --data.columns {','.join(mappings)} (or {role}={names[1]})"
            raise RowError(what, self.values[names[0]], fix, of_file=True)
        return self.values[names[0]] if names else None

    def _differ(self, names: Sequence[str]) -> bool:
        """Whether several columns say several things."""
        return len({normal(str(self.values[name])) for name in names}) > 1

    def unused(self) -> list[str]:
        """Filled columns that were not read."""
        return [name for name, value in self.values.items() if name not in self.used and not is_missing(value)]
