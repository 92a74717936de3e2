"""Chats that are made here, to try fine-tuning with: sums, and look-ups in a table that the chat itself holds.

A function of a seed alone, so that every machine has the same. A small model learns in minutes to answer them.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raynium.config.local_folders import scratch_folder
from raynium.storage.local_files import write_atomically

NUM_CHATS = 6000
# Part of the file's name: another number where other chats are made.
VERSION = 1
_THINGS = ("apples", "books", "cups", "doors", "eggs", "forks", "gloves", "hats")


def made_chats_file() -> Path:
    """The chats as JSON lines, on this machine; written first where they are not there."""
    path = scratch_folder() / f"made/chats-{VERSION}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(f"{json.dumps(chat)}\n" for chat in made_chats(NUM_CHATS)).encode())
    return path


def made_chats(number: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records with `messages`: one to three questions and answers."""
    chance = random.Random(seed)
    for _ in range(number):
        counts = {thing: chance.randint(0, 9) for thing in chance.sample(_THINGS, 3)}
        stock = ", ".join(f"{count} {thing}" for thing, count in counts.items())
        messages = [{"role": "system", "content": f"In the shop: {stock}."}]
        for _ in range(chance.randint(1, 3)):
            question, answer = _sum(chance) if chance.random() < 0.3 else _look_up(chance, counts)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": messages}


def _sum(chance: random.Random) -> tuple[str, str]:
    first, second = chance.randint(0, 9), chance.randint(0, 9)
    return f"What is {first} + {second}?", f"{first} + {second} = {first + second}"


def _look_up(chance: random.Random, counts: dict[str, int]) -> tuple[str, str]:
    thing = chance.choice([*counts])
    return f"How many {thing}?", f"There are {counts[thing]} {thing}."
