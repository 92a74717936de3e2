"""The rule of what evaluations are named by, and of the metric that checkpoints and patience go by."""

from collections.abc import Iterator

from raynium.config.judged import MEASURES, OF_QUESTIONS, STORE_NAME, best_value_of, names_of
from raynium.config.schema import Config


def judged_by(config: Config) -> Iterator[str]:
    """Names under eval/, and checkpoint.best_metric, which must be one that the run's evaluations report."""
    names: dict[str, str] = {}
    for field, name in names_of(config):
        # The stores of a mixture have a rule of their own.
        named_here = not field.startswith("data.")
        if named_here and not STORE_NAME.fullmatch(name):
            yield (
                f"{field}: metrics know it as {name!r}, the last part of its place, which must be 1 to 64 of letters, "
                "digits, '.', '_' and '-'; rename it"
            )
        elif named_here and name in names:
            yield f"{field}: metrics know it as {name!r}, and {names[name]} as the same; rename one of them"
        names.setdefault(name, field)
    if config.evaluate.sets and config.task in ("dpo", "orpo"):
        yield (
            f"evaluate.sets is given with task {config.task}, which judges pairs of the run's own stores: take it out"
        )
    section = config.checkpoint
    metric, last = section.best_metric, section.best_metric.rpartition("/")[2]
    own = metric.split("/")[1:-1]
    questions = {name for field, name in names_of(config) if field.startswith("evaluate.tasks")}
    if own and (len(own) > 1 or own[0] not in names):
        known = ", ".join(names) or "none"
        yield (
            f"checkpoint.best_metric is {metric!r}, and nothing is evaluated under that name: those that have a name "
            f"of their own are {known} (evaluate.sets, evaluate.tasks, data.mixture)"
        )
    elif (last in OF_QUESTIONS) != (bool(own) and own[0] in questions):
        yield (
            f"checkpoint.best_metric is {metric!r}: {' and '.join(OF_QUESTIONS)} are of questions (evaluate.tasks), as "
            "eval/<file>/acc, and documents have others, as eval/loss"
        )
    elif config.task in MEASURES and not own and last not in MEASURES[config.task]:
        yield (
            f"checkpoint.best_metric is {metric!r}, and with task {config.task} evaluations report eval/"
            f"{', eval/'.join(MEASURES[config.task])}: set one of these"
        )
    elif best_value_of(section) is None:
        yield (
            f"checkpoint.best_metric is {metric!r}, of which it is not known whether high or low is good: set "
            "checkpoint.best_mode to highest or lowest"
        )
