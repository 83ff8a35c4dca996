"""Valid labelled rows, changed at random: no traceback, and nothing is lost that the report does not name.

FAULT_TESTS=long python -m unittest tests.test_system_pairs_mutations      2,000 changes, other ones each time
"""

from __future__ import annotations

import json
import os
import random
import shutil
import unittest
from collections.abc import Callable, Iterator
from typing import Any

from tests.support import temporary_directory
from utils.data.examples import TaskReport, read_task_examples
from utils.data.labelled.column_roles import column_name
from utils.exceptions import DataError

CHANGES = 2000 if os.environ.get("FAULT_TESTS") == "long" else 250
NAMES = (
    *("question", "answer", "answers", "context", "passage", "options", "choices", "label", "weight", "train", "tools"),
    *(
        "system",
        "history",
        "messages",
        "conversations",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "text",
    ),
    *("response", "chosen", "rejected", "answer_idx", "answer_index", "is_impossible", "source", "document", "image"),
    *("A", "B", "reasoning", "title", "id", "mood", "reply", "query", "solution", "target", "url"),
)


def word(random_: random.Random) -> str:
    """A word that stands nowhere else."""
    return f"w{random_.randrange(10**9):09d}"


def valid(random_: random.Random) -> dict[str, Any]:
    """A row of one of the shapes, every text of it a word of its own."""
    w = lambda: word(random_)  # noqa: E731
    turns = [
        {"role": "system", "content": w()},
        {"role": "user", "content": w()},
        {"role": "assistant", "content": w()},
        {"role": "user", "content": w()},
        {"role": "assistant", "content": w()},
    ]
    shapes: list[Callable[[], dict[str, Any]]] = [
        lambda: {"question": w(), "answer": w(), "context": w(), "document": w()},
        lambda: {"question": w(), "choices": (texts := [w(), w(), w()]), "answer": texts[1]},
        lambda: {"question": w(), "options": {"A": w(), "B": w()}, "answer": "B"},
        lambda: {"messages": turns},
        lambda: {"instruction": w(), "input": w(), "output": w(), "system": w()},
        lambda: {"prompt": turns[:2], "completion": w()},
        lambda: {
            "id": w(),
            "title": w(),
            "context": w(),
            "question": w(),
            "answers": {"text": [w()], "answer_start": [0]},
        },
    ]
    return random_.choice(shapes)()


def changed(row: dict[str, Any], random_: random.Random) -> dict[str, Any]:
    """One to three changes: a column renamed, taken out, added, emptied, doubled or given another kind of value."""
    row = json.loads(json.dumps(row))
    for _ in range(random_.randint(1, 3)):
        name = random_.choice(list(row)) if row else random_.choice(NAMES)
        what = random_.randrange(8)
        others = (None, "", 0, 1, False, True, 0.5, [], {}, [word(random_)], {"text": word(random_)}, word(random_))
        if what == 0 and name in row:
            row[random_.choice(NAMES)] = row.pop(name)
        elif what == 1:
            row.pop(name, None)
        elif what in (2, 3):
            row[random_.choice(NAMES)] = word(random_)
        elif what == 4:
            row[name] = random_.choice(others)
        elif what == 5 and isinstance(row.get(name), list) and row[name]:
            row[name].insert(random_.randrange(len(row[name]) + 1), random_.choice([*row[name], *others]))
        elif what == 6 and isinstance(row.get(name), list) and any(isinstance(t, dict) for t in row[name]):
            turn = random_.choice([t for t in row[name] if isinstance(t, dict)])
            marks = (
                ("weight", 0),
                ("weight", 0.3),
                ("train", False),
                ("role", "tool"),
                ("content", None),
                ("mood", word(random_)),
            )
            turn.update([random_.choice(marks)])
        else:
            row[random_.choice(NAMES)] = random_.choice(others)
    return row


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


class Mutations(unittest.TestCase):
    def test_no_traceback_and_every_text_is_used_or_named(self) -> None:
        seed = 0 if CHANGES < 2000 else random.SystemRandom().randrange(10**6)
        random_, folder, accepted = random.Random(seed), temporary_directory(), 0
        for number in range(CHANGES):
            rows = [changed(valid(random_), random_) for _ in range(random_.randint(1, 3))]
            path = folder / "pairs.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            with self.subTest(seed=seed, number=number, rows=rows):
                try:
                    examples, found = read_task_examples(str(path), cache_dir=folder / "cache")
                except DataError:
                    continue
                accepted += 1
                self.assertEqual(found.rows, len(rows))
                self.assertEqual(found.rows, found.examples + sum(found.dropped.values()))
                self.assertEqual([], list(self.lost(rows, examples, found)))
        shutil.rmtree(folder)
        self.assertGreater(accepted, CHANGES / 8, "hardly anything was accepted, so little was tested")

    def lost(self, rows: list[dict[str, Any]], examples: list[dict[str, Any]], found: TaskReport) -> Iterator[str]:
        """Texts that are in no example and in no column that the report names."""
        kept = json.dumps(examples)
        left_out = sum(found.dropped.values())
        named = {*found.columns_not_used, *found.columns.get("mark", {}), *found.columns.get("answer_index", {})}
        for row in rows:
            missing = [
                (column_name(column), text)
                for column, value in row.items()
                for text in texts(value)
                if text.startswith("w") and text not in kept and column_name(column) not in named
            ]
            if len(missing) == sum(t.startswith("w") for v in row.values() for t in texts(v)) and left_out:
                continue  # the whole row
            for column, text in missing:
                cut = any("cut" in note or "key of a turn" in note for note in found.notes)
                if not (column in ("messages", "conversations", "prompt") and cut):
                    yield f"{column}: {text}"


if __name__ == "__main__":
    unittest.main()
