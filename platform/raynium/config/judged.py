"""By what a run is judged while it trains: the names of its evaluations' metrics, and which of their values is best."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from raynium.config.schema import CheckpointSection, Config

# Part of the names of metrics, and of a folder.
STORE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Best = Literal["lowest", "highest"]
# By the last part of a metric's name.
BEST: dict[str, Best] = {
    **dict.fromkeys(("loss", "bits_per_byte", "perplexity"), "lowest"),
    **dict.fromkeys(("acc", "acc_norm", "rewards_margins", "rewards_accuracies"), "highest"),
}
# What our own tasks report of held-out documents; one that is not here reports what it likes.
MEASURES = {"pretraining": ("loss", "bits_per_byte"), "sft": ("loss", "perplexity")}
# Of a file of questions.
OF_QUESTIONS = ("acc", "acc_norm")


def best_value_of(section: CheckpointSection) -> Best | None:
    """Of checkpoint.best_metric; None where neither its name nor best_mode says so."""
    if section.best_mode != "auto":
        return section.best_mode
    return BEST.get(section.best_metric.rpartition("/")[2])


def judged_alike(saved: Mapping[str, Any], now: Config) -> bool:
    """Whether what ended the run of the config `saved` (in its stored form) would end that of `now`."""
    before, after = saved, now.model_dump(mode="json")
    return before["evaluate"].get("patience") == after["evaluate"]["patience"] and all(
        before["checkpoint"].get(name) == after["checkpoint"][name] for name in ("best_metric", "best_mode")
    )


def name_of_place(place: str) -> str:
    """By which metrics know a set or a file of questions: `arc` of s3://bucket/arc.jsonl."""
    return place.rstrip("/").rpartition("/")[2].removesuffix(".jsonl")


def names_of(config: Config) -> Iterator[tuple[str, str]]:
    """(field, name) of all that evaluations know by a name of its own."""
    for number, store in enumerate(config.data.mixture):
        yield f"data.mixture[{number}].store", store.name
    for number, place in enumerate(config.evaluate.sets):
        yield f"evaluate.sets[{number}]", name_of_place(place)
    for number, place in enumerate(config.evaluate.tasks):
        yield f"evaluate.tasks[{number}]", name_of_place(place)
