"""The section of a config that says what becomes of faults."""

from raynium.config.section import Failures, Seconds, Section


class FaultSection(Section):
    """What a failure may cost before the run gives up."""

    max_restarts_without_progress: Failures = 3
    """Generations that failed with no new checkpoint between."""
    max_node_failures_without_progress: Failures = 8
    """Lost nodes and agents with no new checkpoint between."""
    upload_silence_seconds: Seconds = 300.0
    """An upload of which nothing moves for so long is given up: training goes on without it."""
    stop_seconds: Seconds = 900.0
    """Ranks that have not saved and ended so long after the run was asked to stop are killed."""
