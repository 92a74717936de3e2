"""The section of a config that says what becomes of faults."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from raynium.config.section import Accepts, Failures, PositiveFloat, Private, Seconds, Section, Steps, Unit

VARIABLE = r"^\$[A-Za-z_][A-Za-z0-9_]*$"
# More than the name of a host, with a scheme or as curl takes it: of a webhook, that more is what lets in.
ADDRESS = re.compile(
    r"""[a-z][a-z0-9+.-]*://[^\s/?#'"]+(@|[/?#][^\s'"])|(^|[\s'"=])([a-z0-9-]+\.)+[a-z]{2,}(:[0-9]+)?/[^\s'"]""",
    re.IGNORECASE,
)


def _without_address(words: tuple[str, ...]) -> tuple[str, ...]:
    if any(ADDRESS.search(word) for word in words):
        raise ValueError("a word holds an address")
    return words


# Whoever waits for it looks many times within it: less than a second would keep a core busy. The most keeps a verdict
# before the end of a collective's own patience (accelerators/timeouts.py).
Silence = Annotated[float, Field(ge=1, le=3600), Unit("seconds")]
LongSilence = Annotated[float, Field(ge=1, le=3 * 3600), Unit("seconds")]

# The config is printed, logged and stored.
Command = Annotated[
    tuple[str, ...],
    AfterValidator(_without_address),
    Private(),
    Accepts(
        "a list of words without an address in them, which may be a secret: put that into an environment variable "
        "where the driver runs and give $NAME as the word, or into a script"
    ),
]
Variable = Annotated[
    str,
    Field(pattern=VARIABLE),
    Private(),
    Accepts("$NAME of an environment variable that holds the address where the driver runs (it may be a secret)"),
]


class FaultSection(Section):
    """What a failure may cost before the run gives up."""

    max_restarts_without_progress: Failures = 3
    """Generations that failed with no progress between: a checkpoint, or a snapshot in memory that ranks went on from,
    of a newer step than any before."""
    max_node_failures_without_progress: Failures = 8
    """Lost nodes and agents with no progress between, as above."""
    upload_silence_seconds: Silence = 300.0
    """An upload of which nothing moves for so long is given up: training goes on without it. So is a call of the run
    coordinator to the store, at most 60 s: a checkpoint is told not to be committed, the start of ranks tried again."""
    replace_seconds: Seconds = 300.0
    """A lost node is waited for so long, before the run goes on on fewer (cluster.min_nodes)."""
    stop_seconds: Seconds = 900.0
    """Ranks that have not saved and ended so long after the run was asked to stop are killed."""
    hang_seconds: LongSilence | None = None
    """If the rank that is behind makes a step, or waits for its data, for so long, the run hangs: what every rank does
    is kept, and all start again. null: 10 times the slowest of the last 100 steps, at least 180 s, on Neuron at least
    660 s, at most 3 hours. A process that a signal has stopped is given as long in any phase; others have their own
    time: loading, the first two steps and an evaluation's batch 30 minutes, a compilation 3 hours."""
    max_bad_steps: Annotated[int, Field(ge=0, lt=256), Unit("steps")] = 10
    """Bad steps, of any 1,000 in a row: their loss or gradient norm is not finite, or leapt and was undone. Nothing is
    learned from them and training goes on, so all ranks go back as often at most. One more ends the run, and keeps its
    samples and the gradient norm of each layer as an artifact. Steps that are left out with a leap that came back, and
    data.leave_out_steps, are not counted. Where as many were bad, norms that leap are clipped and learned from."""
    spike_score: PositiveFloat | None = 30.0
    """A step whose loss or gradient norm lies more than so many robust standard deviations (1.4826 × the median
    deviation, at least 1 % of the median) above the median of the last 100 is undone: all ranks go back to the last
    snapshot and leave it out. A loss also has to pass all 100 by 0.5, a norm to be 10 times the greatest of them, and
    above 1, or optimizer.clip_norm where that is less. If it comes back, they go back further. null: none is."""
    snapshot_every_steps: Steps | None = None
    """Also keep the state in the node's memory after each multiple of it, without an upload: a restart begins there. It
    takes a third image of the state, and is left out where it would have to wait. null: at checkpoints only."""
    audit_every_steps: Steps | None = None
    """At each multiple of it every data rank also computes its neighbour's gradients, of the same samples with the same
    parameters, before the step is applied. Where the bits differ all ranks compute them again, and the majority names
    the node that is wrong. Costs about a step each time: 0.1 % at 1000. Native engine with FSDP2. null: none is."""
    buddy_copies: bool = False
    """Also send each snapshot to the memory of another node, off the ranks' time: who takes the place of a lost node
    begins with that, not with the newest checkpoint. Takes two more images of each rank in a node's memory. It is in
    another zone or placement group if Ray's labels ray.io/availability-zone and placement-group say so."""
    buddy_megabytes_per_second: PositiveFloat = 500.0
    """Of a node's network that such copies may take, in 10⁶ bytes."""
    notify_command: Command = ()
    """Run by the driver, without a shell, for each incident, which it reads as JSON from its standard input. A word
    $NAME stands for that environment variable."""
    notify_url: Variable | None = None
    """Where each incident is sent to (POST, JSON whose `text` is what Slack shows); null for nowhere."""
    stragglers: Literal["name", "leave"] = "name"
    """A rank that all others wait for, a fifth of the step and more over 60 steps, is named with its node. leave: the
    run also leaves that node, as one whose hardware is broken, if another is free. Native engine with FSDP2."""
    bad_instance: Literal["keep", "reboot", "terminate"] = "keep"
    """What the driver asks EC2 to do with the instance of a node that a verdict named, after the run has left it where
    it can. reboot: once each; the node is not admitted again before it passes a preflight. terminate: Ray's autoscaler,
    or Kubernetes, starts another. keep: nothing. Nodes of the driver, of the head, and that others use are kept."""
    bad_node_seconds: Seconds = 86_400.0
    """A node that a verdict named is left out so long by later drivers, and by other runs of run.root, if they find
    enough others. Where a reboot was the remedy, until its Ray is started anew."""
