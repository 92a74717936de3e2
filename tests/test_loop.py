"""The training loop, played with an engine without a model: what happens, in which order, and how it ends."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raynium.data.batch import Batch
from raynium.engines.base import FakeEngine, StepResult, Votes
from raynium.tasks.pretraining import Pretraining
from raynium.tracking.metrics import METRICS, check_metrics
from raynium.train.guard import BAD_AMONG, Guard, Spike, TooManyBadSteps, Verdict, evidence_path, leap
from raynium.train.link import MemoryLink
from raynium.train.loop import Cadence, Outcome, train
from raynium.train.metrics import Throughput
from raynium.train.patience import Patience

SUMS = {"nats": 160.0, "tokens": 64.0}
BAD = {"updated": False, "loss": math.nan}
GOOD = StepResult(loss=2.5, grad_norm=0.5, sums=SUMS, learning_rate=1e-3, agreed=Votes())
THROUGHPUT = Throughput(
    task=Pretraining(),
    world_size=4,
    tokens_per_step=64,
    global_batch_size=2,
    flops_per_token_6n=6e6,
    flops_per_token_with_attention=9e6,
    peak_flops_per_rank=1e9,
)


class Batches:
    """Step s holds the numbers s, s + 1, … and is told to whoever listens."""

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell

    def metrics(self, step: int) -> dict[str, float]:
        return dict.fromkeys(("data/requests", "data/fetched_bytes", "data/used_bytes", "data/wait_seconds"), 3.0)

    def names(self, step: int) -> str:
        return f"its samples are those of {step}"

    def batch(self, step: int) -> Batch:
        self._tell(f"fetch {step}")
        tokens_BT = torch.arange(step, step + 8).reshape(2, 4)
        return Batch(tokens_BT, tokens_BT + 1)


class Engine(FakeEngine):
    """The fake, with a result that a test may change: `change[step]` are fields of StepResult."""

    def __init__(self, tell: Callable[[str], None], change: dict[int, dict[str, Any]]):
        super().__init__()
        self._tell = tell
        self._change = change

    def step(self, batch: Batch, *, step: int, votes: Votes) -> StepResult:
        self._tell(f"step {step}")
        result = super().step(batch, step=step, votes=votes)
        return replace(result, **self._change.get(step, {}))


class Link(MemoryLink):
    """The fake, which also writes everything into the journal."""

    def __init__(self, tell: Callable[[str], None], stop_at: int | None):
        super().__init__(stop_at=stop_at)
        self._tell = tell

    def phase(self, name: str, step: int) -> None:
        self._tell(f"phase {name} {step}")
        super().phase(name, step)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self._tell(f"report {step}: {', '.join(sorted({name.partition('/')[0] for name in metrics}))}")
        super().step(step, metrics)


class Play:
    """One call of `train()`. `journal` is the sequence of all that happened; `states` the engine's at each save."""

    def __init__(
        self,
        cadence: Cadence,
        *,
        start_step: int = 0,
        start_state: torch.Tensor | None = None,
        stop_at: int | None = None,
        change: dict[int, dict[str, Any]] | None = None,
        busy_until: int = 0,
        patience: int | None = None,
        guard: Guard | None = None,
    ):
        self.busy_until = busy_until  # the step until which this rank would rather leave saves out
        self.journal: list[str] = []
        self.states: dict[int, torch.Tensor] = {}
        self.engine = Engine(self.journal.append, change or {})
        if start_state is not None:
            self.engine.state()[0].tensor.copy_(start_state)
        self.link = Link(self.journal.append, stop_at)
        self._arguments: dict[str, Any] = dict(
            engine=self.engine,
            batches=Batches(self.journal.append),
            cadence=cadence,
            start_step=start_step,
            evaluate=self._evaluate,
            guard=guard or Guard(),
            evidence=self,
            patience=Patience(most=patience),
            snapshots=self,
            throughput=THROUGHPUT,
            link=self.link,
        )

    def of(self, step: int, batch: Batch, result: StepResult, why: str) -> str:
        return f"evidence of step {step}: {why}"

    def run(self) -> Outcome:
        return train(**self._arguments)

    def losses(self) -> dict[int, float]:
        return {step: metrics["train/loss"] for step, metrics in self.link.steps.items()}

    def _evaluate(self) -> dict[str, float]:
        self.journal.append("evaluate")
        return {"eval/loss": 1.0, "eval/bits_per_byte": 0.5}

    def wants_to_skip(self, *, upload: bool) -> bool:
        return self.busy_until > max(self.link.steps, default=0)

    def save(self, step: int, *, upload: bool) -> None:
        self.journal.append(f"save {step}" if upload else f"keep {step}")
        self.states[step] = self.engine.state()[0].tensor.clone()
        cost = {"checkpoint/stall_seconds": 0.5, "checkpoint/wait_seconds": 0.0}
        self.link.step(step, cost if upload else {"snapshot/stall_seconds": 0.1})


def plain(step: int) -> list[str]:
    return [f"fetch {step}", f"phase step {step}", f"step {step}"]


REPORT = "data, throughput, time, train"
EVALUATED = "data, eval, throughput, time, train"


def saved(step: int) -> list[str]:
    return [f"phase save {step}", f"save {step}", f"report {step}: checkpoint"]


def test_the_whole_sequence_of_a_run() -> None:
    play = Play(Cadence(total_steps=5, checkpoint_every=3, evaluate_every=2))
    assert play.run() == Outcome(5, "finished")
    assert play.journal == [
        *plain(1), f"report 1: {REPORT}",
        *plain(2), "phase evaluate 2", "evaluate", f"report 2: {EVALUATED}",
        *plain(3), f"report 3: {REPORT}", *saved(3),
        *plain(4), "phase evaluate 4", "evaluate", f"report 4: {EVALUATED}",
        *plain(5), "phase evaluate 5", "evaluate", f"report 5: {EVALUATED}", *saved(5),
    ]  # fmt: skip


def test_snapshots_between_checkpoints_are_kept_and_not_uploaded() -> None:
    play = Play(Cadence(total_steps=5, checkpoint_every=4, evaluate_every=100, snapshot_every=2))
    play.run()
    kept = ["phase save 2", "keep 2", "report 2: snapshot"]
    begin = [*plain(1), f"report 1: {REPORT}", *plain(2), f"report 2: {REPORT}", *kept]
    assert play.journal[: len(begin)] == begin
    assert [line for line in play.journal if line.startswith(("save", "keep"))] == ["keep 2", "save 4", "save 5"]


def test_a_snapshot_that_would_have_to_wait_is_left_out_untold() -> None:
    play = Play(Cadence(total_steps=5, checkpoint_every=100, evaluate_every=100, snapshot_every=1), busy_until=3)
    play.run()
    assert [line for line in play.journal if line.startswith(("save", "keep"))] == ["keep 4", "save 5"]
    assert not any("checkpoint/skipped_saves" in metrics for metrics in play.link.steps.values())


def test_a_resumed_run_takes_the_steps_that_are_left_with_the_same_losses() -> None:
    cadence = Cadence(total_steps=7, checkpoint_every=3, evaluate_every=100)
    whole = Play(cadence)
    whole.run()
    resumed = Play(cadence, start_step=3, start_state=whole.states[3])
    assert resumed.run() == Outcome(7, "finished")
    assert resumed.losses() == {step: loss for step, loss in whole.losses().items() if step > 3}
    assert torch.equal(resumed.states[7], whole.states[7])


def test_a_run_that_died_after_its_last_save_only_evaluates() -> None:
    play = Play(Cadence(total_steps=5, checkpoint_every=3, evaluate_every=2), start_step=5)
    assert play.run() == Outcome(5, "finished")
    assert play.journal == ["evaluate", "report 5: eval"]


def test_a_stop_saves_at_the_very_step_at_which_it_is_agreed() -> None:
    play = Play(Cadence(total_steps=9, checkpoint_every=100, evaluate_every=100), stop_at=2)
    assert play.run() == Outcome(3, "stopped")
    assert play.journal[-7:] == [*plain(3), f"report 3: {REPORT}", *saved(3)]


def test_saves_are_left_out_and_counted_while_uploads_are_behind_but_never_the_last() -> None:
    play = Play(Cadence(total_steps=6, checkpoint_every=1, evaluate_every=100), busy_until=3)
    play.run()
    assert list(play.states) == [4, 5, 6]
    skipped = {step: metrics.get("checkpoint/skipped_saves") for step, metrics in play.link.steps.items()}
    assert skipped == {1: 1.0, 2: 2.0, 3: 3.0, 4: None, 5: None, 6: None}

    play = Play(Cadence(total_steps=3, checkpoint_every=1, evaluate_every=100), busy_until=9)
    play.run()
    assert list(play.states) == [3]


def test_a_stop_is_saved_however_far_uploads_are_behind() -> None:
    play = Play(Cadence(total_steps=9, checkpoint_every=100, evaluate_every=100), stop_at=2, busy_until=99)
    assert play.run() == Outcome(3, "stopped") and list(play.states) == [3]


def test_a_save_that_only_another_rank_would_skip_is_left_out_too() -> None:
    change = {2: {"agreed": Votes(skip_save=True)}}
    play = Play(Cadence(total_steps=3, checkpoint_every=1, evaluate_every=100), change=change)
    play.run()
    assert list(play.states) == [1, 3]


def test_a_stop_that_another_rank_asked_for_counts_too() -> None:
    play = Play(
        Cadence(total_steps=9, checkpoint_every=100, evaluate_every=100), change={4: {"agreed": Votes(stop=True)}}
    )
    assert play.run() == Outcome(4, "stopped")
    assert list(play.states) == [4]


def test_a_stop_at_the_last_step_is_a_finish() -> None:
    play = Play(Cadence(total_steps=3, checkpoint_every=100, evaluate_every=100), stop_at=2)
    assert play.run() == Outcome(3, "finished")
    assert play.journal.count("save 3") == play.journal.count("evaluate") == 1


def test_a_bad_step_is_told_with_its_samples_and_training_goes_on() -> None:
    play = Play(Cadence(total_steps=4, checkpoint_every=2, evaluate_every=9), change={2: BAD}, guard=Guard(most_bad=1))
    assert play.run() == Outcome(4, "finished")
    [(step, why)] = play.link.bad_steps
    assert step == 2 and why.startswith("loss nan, gradient norm 1: not finite") and why.endswith("are those of 2")
    assert list(play.states) == [2, 4]
    counts = {step: metrics.get("train/left_out_steps") for step, metrics in play.link.steps.items()}
    assert counts == {1: None, 2: 1.0, 3: 1.0, 4: 1.0}


def test_one_bad_step_too_many_ends_the_run_and_reaches_nothing() -> None:
    change: dict[int, dict[str, Any]] = {2: BAD, 3: {"updated": False, "grad_norm": math.inf}}
    play = Play(Cadence(total_steps=9, checkpoint_every=1, evaluate_every=99), change=change, guard=Guard(most_bad=1))
    with pytest.raises(
        TooManyBadSteps,
        match=r"step 3: .*2 were bad \(2, 3; fault.max_bad_steps=1\).*bad-steps/step-000000003.json.*learning_rate",
    ):
        play.run()
    assert list(play.states) == list(play.link.steps) == [1, 2]
    assert [step for step, _ in play.link.bad_steps] == [2, 3]
    [(path, text)] = play.link.artifacts.items()
    assert path == evidence_path(3) and text.startswith("evidence of step 3: loss 1.")


def test_steps_that_the_run_was_told_to_leave_out_are_voted_for_and_are_not_bad() -> None:
    play = Play(Cadence(total_steps=4, checkpoint_every=9, evaluate_every=9), guard=Guard(told=(2, 3)))
    assert play.run() == Outcome(4, "finished")
    assert [why.partition(" (")[0] for _, why in play.link.bad_steps] == ["left out as data.leave_out_steps says"] * 2
    losses = list(play.losses().values())
    assert losses[0] == losses[1] == losses[2] != losses[3]


def test_a_generation_that_goes_on_counts_what_was_left_out_before_it() -> None:
    first = Guard(most_bad=3)
    for step in (2, 5):
        assert first.judge(step, replace(GOOD, **BAD)) is not None
    second = Guard(most_bad=3)
    second.chunks(saved_here=True)[0].tensor.copy_(first.chunks(saved_here=True)[0].tensor)
    assert [second.updates(step) for step in (5, 9)] == [3, 7]
    assert second.metrics() == {"train/left_out_steps": 2.0}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 3000), unique=True, max_size=300).map(sorted), st.integers(0, 255))
def test_bad_steps_end_a_run_exactly_where_too_many_lie_close_together(steps: list[int], most_bad: int) -> None:
    guard = Guard(most_bad=most_bad)
    for number, step in enumerate(steps):
        verdict = guard.judge(step, replace(GOOD, **BAD))
        assert isinstance(verdict, Verdict)
        close = [each for each in steps[: number + 1] if each > step - BAD_AMONG]
        assert (verdict.ends is not None) == (len(close) > most_bad)
        assert guard.updates(step) == step - number - 1
        if verdict.ends is not None:
            return


# ---------------------------------------------------------------------------------------------------------- leaps


def steady(step: int) -> StepResult:
    """Losses and norms that vary by some percent, and fall."""
    return replace(GOOD, loss=3.0 - step / 1000 + 0.05 * math.sin(step), grad_norm=0.5 + 0.1 * math.cos(3 * step))


@pytest.mark.parametrize("field", ["loss", "grad_norm"])
def test_a_loss_or_norm_that_leaps_is_to_be_undone_and_passes_once_it_was(field: str) -> None:
    guard = Guard(most_bad=1, spike_score=20)
    assert [guard.judge(step, steady(step)) for step in range(1, 81)] == [None] * 80
    bad = replace(steady(81), **{field: 40.0})
    verdict = guard.judge(81, bad)
    assert verdict is not None and isinstance(verdict.ends, Spike) and verdict.ends.step == 81
    assert "robust standard deviations above the median" in verdict.why and "last snapshot" in str(verdict.ends)

    again = Guard(most_bad=1, spike_score=20, undone=(81,))
    assert again.leaves_out(81) and not again.leaves_out(80)
    assert [again.judge(step, steady(step)) for step in range(1, 81)] == [None] * 80
    passed = again.judge(81, replace(bad, updated=False))
    assert passed is not None and passed.ends is None and "left out, since it leapt" in passed.why
    assert again.judge(82, steady(82)) is None and again.updates(82) == 81


def test_leaps_count_as_bad_steps_and_too_many_end_the_run() -> None:
    guard = Guard(most_bad=0, spike_score=20)
    for step in range(1, 81):
        guard.judge(step, steady(step))
    verdict = guard.judge(81, replace(GOOD, loss=40.0))
    assert verdict is not None and isinstance(verdict.ends, TooManyBadSteps)


def test_a_better_loss_a_short_past_other_data_and_no_limit_are_no_leap() -> None:
    falls = Guard(spike_score=20)
    assert [falls.judge(step, steady(step)) for step in range(1, 60)] == [None] * 59
    assert falls.judge(60, replace(GOOD, loss=0.01, grad_norm=0.001)) is None
    short = Guard(spike_score=20)
    assert [short.judge(step, steady(step)) for step in range(1, 50)] == [None] * 49
    assert short.judge(50, replace(GOOD, loss=40.0)) is None
    other = Guard(spike_score=20, begins=(60,))
    assert [other.judge(step, steady(step)) for step in range(1, 60)] == [None] * 59
    assert other.judge(60, replace(GOOD, loss=40.0)) is None
    unlimited = Guard()
    assert [unlimited.judge(step, steady(step)) for step in range(1, 60)] == [None] * 59
    assert unlimited.judge(60, replace(GOOD, loss=40.0)) is None


def test_steps_before_a_leap_that_came_back_are_left_out_and_are_not_bad() -> None:
    guard = Guard(most_bad=0, suspected=(7, 8))
    assert [guard.leaves_out(step) for step in (6, 7, 8, 9)] == [False, True, True, False]
    for step in (7, 8):
        verdict = guard.judge(step, replace(GOOD, updated=False))
        assert verdict is not None and verdict.ends is None and "a leap came back" in verdict.why
    assert guard.updates(8) == 6


def test_bad_steps_are_remembered_however_many_others_are_left_out_between() -> None:
    guard = Guard(most_bad=1, told=range(100, 400), suspected=range(500, 800))
    assert guard.judge(50, replace(GOOD, **BAD)) is not None
    for step in (*range(100, 400), *range(500, 800)):
        verdict = guard.judge(step, replace(GOOD, updated=False))
        assert verdict is not None and verdict.ends is None
    verdict = guard.judge(900, replace(GOOD, **BAD))
    assert verdict is not None and "2 were bad (50, 900;" in str(verdict.ends)
    assert guard.updates(900) == 900 - 602


def test_what_was_undone_counts_where_the_run_has_gone_back_behind_it_and_among_suspected_steps() -> None:
    """Of 1,000 steps in a row, with the one that is judged anywhere among them."""
    for undone, ends in ((1099, True), (1100, False)):
        guard = Guard(most_bad=1, undone=(undone,), suspected=range(90, 1200))
        verdict = guard.judge(undone, replace(GOOD, updated=False))
        assert verdict is not None and verdict.ends is None and "leapt when it was taken before" in verdict.why
        earlier = Guard(most_bad=1, undone=(undone,))
        verdict = earlier.judge(100, replace(GOOD, **BAD))
        assert verdict is not None and isinstance(verdict.ends, TooManyBadSteps) == ends


def test_the_score_of_a_leap() -> None:
    recent = [2.0, 2.1, 1.9, 2.2, 1.8] * 12
    assert leap(5.0, recent) == (pytest.approx(3.0 / (1.4826 * 0.1)), 2.0)
    assert leap(2.1, [2.0] * 60) == (pytest.approx(0.1 / 0.02), 2.0), "one percent where nothing varies"
    assert leap(1.0, [0.0] * 60)[0] > 1e200
    assert leap(math.inf, recent)[0] == math.inf


# Gradient norms of a model of two layers that learns 11 kB of text by heart at a learning rate of 0.01, in steps 2,401
# to 2,501: the last is 128 robust standard deviations above the median, and the run is as healthy after it as before.
BY_HEART = [
    0.282, 0.569, 0.524, 0.266, 0.306, 4.2, 0.794, 0.196, 0.225, 0.365, 0.149, 0.211, 0.64, 0.206, 0.528, 0.297,
    0.41, 0.752, 1.26, 0.552, 0.196, 0.76, 0.3, 0.384, 0.319, 0.515, 0.245, 0.666, 0.166, 3.06, 0.927, 0.279, 0.175,
    1.04, 0.16, 0.285, 0.152, 0.276, 0.161, 0.269, 0.226, 0.415, 0.169, 0.288, 0.192, 0.353, 6.77, 0.216, 0.173,
    0.262, 0.283, 0.246, 0.223, 0.555, 0.267, 0.271, 0.328, 0.157, 0.278, 0.254, 0.849, 0.167, 0.355, 0.3, 0.27,
    0.291, 1.02, 0.954, 1.89, 0.835, 0.174, 2.11, 0.26, 0.247, 0.204, 0.184, 0.208, 0.76, 0.258, 0.252, 0.787,
    0.168, 0.26, 0.281, 0.259, 0.915, 0.747, 0.194, 0.206, 0.17, 0.413, 0.483, 0.49, 0.726, 0.59, 0.482, 0.138,
    0.19, 0.166, 0.176, 20.5,
]  # fmt: skip


def test_norms_of_a_model_that_learns_a_text_by_heart_are_no_leaps() -> None:
    assert leap(BY_HEART[-1], BY_HEART[:-1])[0] > 100
    guard = Guard(most_bad=10, spike_score=30)
    results = [replace(GOOD, loss=0.07, grad_norm=norm) for norm in BY_HEART]
    assert [guard.judge(step, result) for step, result in enumerate(results, 1)] == [None] * len(results)
    # Nor is a usual norm after many that were nearly none.
    still = Guard(most_bad=10, spike_score=30)
    assert [still.judge(step, replace(GOOD, loss=1e-4, grad_norm=1e-5)) for step in range(1, 81)] == [None] * 80
    assert still.judge(81, replace(GOOD, loss=0.4, grad_norm=0.9)) is None
    assert still.judge(82, replace(GOOD, loss=0.4, grad_norm=11.0)) is not None
    clipped = Guard(most_bad=10, spike_score=30, clip_norm=0.1)
    assert [clipped.judge(step, replace(GOOD, grad_norm=1e-5)) for step in range(1, 81)] == [None] * 80
    assert clipped.judge(81, replace(GOOD, grad_norm=0.2)) is not None


NUMBERS = st.floats(0, 1e30)


@settings(deadline=None, max_examples=60)
@given(st.lists(NUMBERS, min_size=60, max_size=130), st.integers(0, 5))
def test_no_norms_whatever_end_a_run_whose_loss_stays(norms: list[float], most_bad: int) -> None:
    guard = Guard(most_bad=most_bad, spike_score=30)
    for step, norm in enumerate(norms, 1):
        verdict = guard.judge(step, replace(steady(step), grad_norm=norm))
        assert verdict is None or isinstance(verdict.ends, Spike)
    assert guard.updates(len(norms)) >= len(norms) - most_bad


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=50, max_size=130), NUMBERS, NUMBERS)
def test_a_leap_passes_all_that_was_before_it_and_what_passes_all_by_far_is_one(
    recent: list[tuple[float, float]], loss: float, norm: float
) -> None:
    guard = Guard(most_bad=10, spike_score=30)
    # As if they had been learned from.
    guard.chunks(saved_here=True)[1].tensor[:, : len(recent[-100:])] = torch.tensor(recent[-100:]).T
    (losses, norms), verdict = (
        zip(*recent[-100:], strict=True),
        guard.judge(131, replace(GOOD, loss=loss, grad_norm=norm)),
    )
    if verdict is not None:
        assert loss > max(losses) + 0.4999 or norm > max(9.99 * max(norms), 0.999)
    else:
        # The median deviation is not greater than the greatest, so so much is a leap of anything.
        assert loss <= 60 * (max(losses) + 1) and norm <= 60 * (max(norms) + 1)


@settings(deadline=None, max_examples=30)
@given(st.sets(st.integers(1, 200), max_size=6), st.sets(st.integers(60, 200), max_size=4), st.integers(0, 200))
def test_every_replay_and_resume_judges_as_the_run_that_was_never_interrupted(
    spoilt: set[int], leaping: set[int], cut: int
) -> None:
    """Ranks that start again from any step, with what the training state holds of it, leave out the same steps."""

    def generation(state: list[torch.Tensor], start: int, undone: set[int], end: int) -> tuple[int, set[int]]:
        guard = Guard(most_bad=99, spike_score=20, undone=undone)
        for chunk, tensor in zip(guard.chunks(saved_here=True), state, strict=False):
            chunk.tensor.copy_(tensor)
        for step in range(start + 1, end + 1):
            result = steady(step)
            if step in spoilt:
                result = replace(result, loss=math.nan, updated=False)
            elif step in leaping:
                result = replace(result, loss=50.0, updated=not guard.leaves_out(step))
            elif guard.leaves_out(step):
                result = replace(result, updated=False)
            verdict = guard.judge(step, result)
            if verdict is not None and isinstance(verdict.ends, Spike):
                return step, undone | {step}
        state[:] = [chunk.tensor.clone() for chunk in guard.chunks(saved_here=True)]
        return end, undone

    def run(cuts: list[int]) -> list[torch.Tensor]:
        state: list[torch.Tensor] = []
        start, undone = 0, set[int]()
        for end in [*cuts, 200]:
            reached = start
            while reached < end or (reached == end and not state):
                before = set(undone)
                reached, undone = generation(state, start, undone, end)
                if undone == before:
                    break
                reached = start
            start = end
        return state

    assert all(torch.equal(a, b) for a, b in zip(run([]), run([cut]), strict=True) if not a.is_floating_point())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(run([]), run([cut]), strict=True))


def test_a_good_step_passes() -> None:
    assert Guard().judge(1, GOOD) is None


@pytest.mark.parametrize(
    ("cadence", "saves", "evaluates"),
    [
        (Cadence(total_steps=10, checkpoint_every=4, evaluate_every=3), [4, 8, 10], [3, 6, 9, 10]),
        (Cadence(total_steps=8, checkpoint_every=4, evaluate_every=8), [4, 8], [8]),
        (Cadence(total_steps=3, checkpoint_every=100, evaluate_every=1), [3], [1, 2, 3]),
        (Cadence(total_steps=1, checkpoint_every=1, evaluate_every=100), [1], [1]),
    ],
)
def test_the_cadence_as_a_sequence(cadence: Cadence, saves: list[int], evaluates: list[int]) -> None:
    steps = range(1, cadence.total_steps + 1)
    assert [step for step in steps if cadence.saves(step)] == saves
    assert [step for step in steps if cadence.evaluates(step)] == evaluates


def test_rates_are_of_all_ranks_and_positions_count_from_step_0() -> None:
    metrics = THROUGHPUT.metrics(10, GOOD, step_seconds=0.5, data_seconds=0.125)
    assert metrics == {
        "train/loss": 2.5,
        "train/grad_norm": 0.5,
        "train/learning_rate": 1e-3,
        "train/tokens": 640.0,
        "train/samples": 20.0,
        "time/step_seconds": 0.5,
        "time/data_seconds": 0.125,
        "throughput/tokens_per_second": 128.0,
        "throughput/tokens_per_second_per_rank": 32.0,
        "throughput/peak_flops_per_rank": 1e9,
        "throughput/mfu_6n": pytest.approx(128 * 6e6 / 4e9),
        "throughput/mfu_with_attention": pytest.approx(128 * 9e6 / 4e9),
    }


def test_without_a_known_peak_no_mfu_is_claimed() -> None:
    with_peak = THROUGHPUT.metrics(1, GOOD, step_seconds=1, data_seconds=0)
    without = replace(THROUGHPUT, peak_flops_per_rank=None).metrics(1, GOOD, step_seconds=1, data_seconds=0)
    mfu = {"throughput/mfu_6n", "throughput/mfu_with_attention", "throughput/peak_flops_per_rank"}
    assert with_peak.keys() - without.keys() == mfu


def test_every_name_that_a_run_reports_is_known_to_tracking() -> None:
    play = Play(
        Cadence(total_steps=4, checkpoint_every=2, evaluate_every=2, snapshot_every=3),
        busy_until=2,
        change={1: BAD},
        guard=Guard(most_bad=1),
    )
    play.run()
    for metrics in play.link.steps.values():
        check_metrics(metrics)
    reported = {name for metrics in play.link.steps.values() for name in metrics}
    of_the_coordinator = {"bytes", "longest_stall_seconds", "upload_seconds", "commit_seconds"}
    of_others = {
        name for name in METRICS if name.partition("/")[0] in ("run", "memory", "compile", "device", "goodput")
    }
    of_others |= {name for name in METRICS if name.startswith("time/") and "rank" in name}
    of_others |= {"eval/perplexity", *(name for name in METRICS if "rewards" in name)}
    assert reported == METRICS.keys() - of_others - {f"checkpoint/{name}" for name in of_the_coordinator}


# ------------------------------------------------------------------------------------------------- the early end


def test_a_run_whose_evaluations_do_not_improve_saves_and_finishes() -> None:
    play = Play(Cadence(20, 4, 2), patience=2)
    outcome = play.run()
    assert (outcome.step, outcome.reason) == (6, "finished")
    assert outcome.why is not None and "eval/loss has not improved in 2 evaluations" in outcome.why
    # It evaluated after steps 2, 4 and 6, and its last state is saved although no save was due.
    assert play.journal.count("evaluate") == 3 and sorted(play.states) == [4, 6]
    assert play.journal[-1] == "report 6: checkpoint"


def test_a_generation_that_starts_where_patience_was_lost_ends_at_once() -> None:
    play = Play(Cadence(20, 4, 2), start_step=6, patience=1)
    patience = play._arguments["patience"]
    patience.judge(4, {"eval/loss": 1.0})
    patience.judge(6, {"eval/loss": 1.0})
    outcome = play.run()
    assert (outcome.step, outcome.reason, outcome.why) == (6, "finished", patience.is_over())
    assert play.journal == ["evaluate", "report 6: eval"]
