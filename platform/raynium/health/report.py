"""What a preflight found: its nodes, what is between them, and whether the run may start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raynium.health.host import Check, Status


@dataclass(frozen=True)
class NodeReport:
    """One node's checks. node_id: Ray's, new in each life of the node."""

    node_id: str
    host: str
    checks: tuple[Check, ...]

    @property
    def bad(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.is_bad)


@dataclass(frozen=True)
class Report:
    """What a preflight found. needed: nodes of the run. busy: hosts that other jobs hold, which were not checked."""

    needed: int
    nodes: tuple[NodeReport, ...]
    between_nodes: tuple[Check, ...] = ()
    busy: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def good_nodes(self) -> tuple[NodeReport, ...]:
        return tuple(node for node in self.nodes if not node.bad)

    @property
    def bad_nodes(self) -> tuple[NodeReport, ...]:
        return tuple(node for node in self.nodes if node.bad)

    def refusal(self) -> str | None:
        """Why the run must not start; None if it may, on the nodes that are not bad."""
        bad = [f"node {node.host}: {check}" for node in self.bad_nodes for check in node.bad]
        if len(self.good_nodes) < self.needed:
            return (
                f"the preflight found {len(self.good_nodes)} fit node(s), and the run needs {self.needed}. "
                + "".join(f"\n  {line}" for line in bad)
                + "\nMend or replace the node(s), or lower cluster.nodes; preflight.before_run=none starts regardless"
            )
        if between := [check for check in self.between_nodes if check.is_bad]:
            hosts = ", ".join(node.host for node in self.good_nodes)
            return (
                f"each of the nodes {hosts} is fit, but not together:"
                + "".join(f"\n  {check}" for check in between)
                + "\nMend the network between them; preflight.before_run=none starts regardless"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "needed_nodes": self.needed,
            "may_start": self.refusal() is None,
            "seconds": round(self.seconds, 2),
            "nodes": [
                {
                    "node_id": node.node_id,
                    "host": node.host,
                    "fit": not node.bad,
                    "checks": [check.to_json() for check in node.checks],
                }
                for node in self.nodes
            ],
            "between_nodes": [check.to_json() for check in self.between_nodes],
            "busy": list(self.busy),
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(where, check, status, found and what to do) of every check, for a table."""
        rows: list[tuple[str, str, str, str]] = [
            (node.host, *_row(check)) for node in self.nodes for check in node.checks
        ]
        rows += [("all nodes", *_row(check)) for check in self.between_nodes]
        return rows + [(host, "-", "skipped", "busy: another job holds its cores") for host in self.busy]

    def summary(self) -> str:
        """One line."""
        bad = [f"{node.host} ({', '.join(check.name for check in node.bad)})" for node in self.bad_nodes]
        warned = sum(check.status == "warning" for node in self.nodes for check in node.checks)
        return (
            f"preflight: {len(self.good_nodes)} fit node(s)"
            + (f", without {'; '.join(bad)}" if bad else "")
            + (f", {warned} warning(s)" if warned else "")
            + f" ({self.seconds:.1f} s)"
        )


def _row(check: Check) -> tuple[str, Status, str]:
    text = check.found if check.status == "ok" else "; ".join(part for part in (check.found, check.remedy) if part)
    return check.name, check.status, text


def blamed(pairs: Mapping[tuple[str, str], bool]) -> set[str]:
    """Nodes that no pair worked with, though it worked for one of their partners. Pair → whether it worked."""
    works = {node for pair, worked in pairs.items() if worked for node in pair}
    failed = [pair for pair, worked in pairs.items() if not worked]
    return {node for a, b in failed for node, other in ((a, b), (b, a)) if node not in works and other in works}


def rounds_of_pairs(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The pairs of neighbours in a ring of three nodes or more, in rounds in which no node stands twice."""
    pairs = list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    if len(nodes) % 2 == 0:
        return [pairs[0::2], pairs[1::2]]
    return [pairs[0:-1:2], pairs[1:-1:2], pairs[-1:]]
