"""Chats and preferences that are made here, to try fine-tuning with: sums, and look-ups in a table that a chat holds.

A function of a seed alone, so that every machine has the same. A small model learns in minutes to answer them.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from raynium.config.local_folders import scratch_folder
from raynium.storage.local_files import write_atomically

NUM_CHATS, NUM_PREFERENCES = 6000, 2000
# Part of the file's name: another number where others are made.
VERSION = 1
_THINGS = ("apples", "books", "cups", "doors", "eggs", "forks", "gloves", "hats")


def made_chats_file() -> Path:
    """The chats as JSON lines, on this machine; written first where they are not there."""
    return _file("chats", lambda: made_chats(NUM_CHATS))


def made_preferences_file() -> Path:
    """The preferences, likewise."""
    return _file("preferences", lambda: made_preferences(NUM_PREFERENCES))


def made_chats(number: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records with `messages`: one to three questions and answers."""
    chance = random.Random(seed)
    for _ in range(number):
        counts, messages = _shop(chance)
        for _ in range(chance.randint(1, 3)):
            question, said, right = _asked(chance, counts)
            messages += [message("user", question), message("assistant", said.format(right))]
        yield {"messages": messages}


def made_preferences(number: int, *, seed: int = 1) -> Iterator[dict[str, Any]]:
    """Records with `prompt`, `chosen` and `rejected`: a question as in the chats, its answer, and a wrong one."""
    chance = random.Random(seed)
    for _ in range(number):
        counts, messages = _shop(chance)
        question, said, right = _asked(chance, counts)
        wrong = chance.choice([number for number in range(right - 3, right + 4) if number >= 0 and number != right])
        answers = {"chosen": said.format(right), "rejected": said.format(wrong)}
        yield {"prompt": [*messages, message("user", question)]} | {
            name: [message("assistant", answer)] for name, answer in answers.items()
        }


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _file(name: str, records: Callable[[], Iterable[dict[str, Any]]]) -> Path:
    path = scratch_folder() / f"made/{name}-{VERSION}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in records()).encode())
    return path


def _shop(chance: random.Random) -> tuple[dict[str, int], list[dict[str, str]]]:
    """What there is, and the message that says so."""
    counts = {thing: chance.randint(0, 9) for thing in chance.sample(_THINGS, 3)}
    stock = ", ".join(f"{count} {thing}" for thing, count in counts.items())
    return counts, [message("system", f"In the shop: {stock}.")]


def _asked(chance: random.Random, counts: dict[str, int]) -> tuple[str, str, int]:
    """A question, the answer but for its last number, and that."""
    if chance.random() < 0.3:
        first, second = chance.randint(0, 9), chance.randint(0, 9)
        return f"What is {first} + {second}?", f"{first} + {second} = {{}}", first + second
    thing = chance.choice([*counts])
    return f"How many {thing}?", f"There are {{}} {thing}.", counts[thing]
