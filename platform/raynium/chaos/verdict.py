"""What is promised of a run under faults, held against the run without them."""

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from raynium.chaos.steps import Steps
from raynium.checkpoint.catalog import choose_checkpoint, list_checkpoints, open_checkpoint
from raynium.checkpoint.verify import verify_checkpoint
from raynium.config.schema import Config
from raynium.errors import RayniumError
from raynium.run.past import run_store
from raynium.run.record import RunRecord, read_record
from raynium.tracking.runs import metric_names, read_metric

# Of the metrics, those that are functions of weights and data alone.
SAME_AREAS = ("train", "eval", "rewards")
# But this one, which each life of the ranks tells anew.
RETOLD = "train/left_out_steps"
# The record's two times are of the wall clock, and its ledger is of the steady one.
LEDGER_SECONDS = 0.5
NORM = "train/grad_norm"


@dataclass(frozen=True)
class Claim:
    """One promise, in words with its numbers, and whether it held."""

    holds: bool
    text: str


def claims(
    plain: Config,
    faulted: Config,
    *,
    steps: tuple[Steps, Steps],
    bad_steps: Collection[int],
    tell: Callable[[str], None],
) -> list[Claim]:
    """All of them, of two runs that have finished. Reads both last checkpoints: this needs torch.

    bad_steps: whose gradient was made to leap or to be none; the other run left them out, and has their true norm.
    """
    records = [read_record(run_store(each)) for each in (plain, faulted)]
    first, second = records
    assert first is not None and second is not None, "both runs have finished"
    tell(f"comparing {plain.run.name} and {faulted.run.name}")
    return [
        _weights(plain, faulted),
        _losses(*steps),
        *_points(first, second, bad_steps),
        _checkpoints(faulted),
        _ledger(second),
    ]


def _weights(plain: Config, faulted: Config) -> Claim:
    from raynium.checkpoint.compare import compare

    last = [choose_checkpoint(run_store(each)) for each in (plain, faulted)]
    if last[0].step != last[1].step:
        return Claim(False, f"weights: the last checkpoints are of steps {last[0].step:,} and {last[1].step:,}")
    found = compare(*last)
    if found.differences:
        some = "; ".join(found.lines()[:3])
        return Claim(False, f"weights: {len(found.differences)} of {len(found.names)} tensors differ: {some}")
    return Claim(True, f"weights: all {len(found.names)} tensors of step {last[0].step:,} are bit-equal")


def _losses(plain: Steps, faulted: Steps) -> Claim:
    """Those that the ranks computed, each time that they took a step."""
    wanted, found = plain.losses(), faulted.losses()
    wrong = sorted(step for step, losses in found.items() if losses != wanted.get(step))
    again = len(faulted.taken) - len(found)
    if wrong or wanted.keys() != found.keys():
        missing = sorted(wanted.keys() - found.keys())
        return Claim(False, f"losses: steps {wrong[:5]} differ, steps {missing[:5]} are missing")
    return Claim(True, f"losses: all of {len(found):,} steps are bit-equal, and of {again:,} that were done again")


def _points(plain: RunRecord, faulted: RunRecord, bad_steps: Collection[int]) -> list[Claim]:
    try:
        wanted, found = _all_points(plain), _all_points(faulted)
    except RayniumError as error:
        return [Claim(False, f"points: MLflow cannot be asked: {error}")]
    doubled = [
        f"{name} at step {step}"
        for name, points in sorted(found.items())
        for step, count in Counter(step for step, _ in points).items()
        if count > 1
    ]
    number = sum(map(len, found.values()))
    all_names = (wanted.keys() | found.keys()) - {RETOLD}
    same = sorted(name for name in all_names if name.partition("/")[0] in SAME_AREAS)
    for points in (wanted, found):
        points[NORM] = [(step, value) for step, value in points.get(NORM, []) if step not in bad_steps]
    other = [name for name in same if not _equal(wanted.get(name, []), found.get(name, []))]
    but = _some(other, ", but for ")
    compared = sum(len(found[name]) for name in same if name in found)
    return [
        Claim(not doubled, f"points: of {number:,} in MLflow {len(doubled)} are doubled{_some(doubled)}"),
        Claim(not other, f"points: of {compared:,} of {len(same)} metrics none is lost or other{but}"),
    ]


def _some(names: list[str], before: str = ": ") -> str:
    return before + ", ".join(names[:3]) if names else ""


def _all_points(record: RunRecord) -> dict[str, list[tuple[int, float]]]:
    """Metric → (step, value), by step."""
    uri, run_id = record.mlflow_uri, record.mlflow_run_id
    assert uri is not None and run_id is not None, "a run that finished has a page"
    return {
        name: [(point.step, point.value) for point in read_metric(uri, run_id, name)]
        for name in metric_names(uri, run_id)
    }


def _equal(first: list[tuple[int, float]], second: list[tuple[int, float]]) -> bool:
    return len(first) == len(second) and all(
        step == other_step and (value == other or (math.isnan(value) and math.isnan(other)))
        for (step, value), (other_step, other) in zip(first, second, strict=True)
    )


def _checkpoints(config: Config) -> Claim:
    """All that the run has kept, to the last byte."""
    store = run_store(config)
    kept = list_checkpoints(store)
    bad = [f"step {each.step}: {each.problem}" for each in kept if each.problem is not None]
    for each in kept:
        if each.problem is None and verify_checkpoint(open_checkpoint(store, each.step), depth="contents"):
            bad.append(f"step {each.step} is damaged")
    return Claim(not bad, f"checkpoints: {len(bad)} of {len(kept)} are bad{_some(bad)}")


def _ledger(record: RunRecord) -> Claim:
    wall = record.heartbeat_unix - record.created_unix - record.idle_seconds
    off = abs(record.ledger.total - wall)
    return Claim(off <= LEDGER_SECONDS, f"ledger: its causes sum to {record.ledger.total:.1f} s of {wall:.1f} s")
