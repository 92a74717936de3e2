"""The nodes that verdicts of this run, and of others of its root, have named: remembered, left out, and cured."""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from raynium.cluster.instances import ask_ec2
from raynium.config.schema import Config
from raynium.errors import LaunchError, StoreError
from raynium.health.report import Report
from raynium.launch.nodes import fitting_nodes, free_nodes, node_hosts, node_resources, own_nodes, users_of
from raynium.run.bad_nodes import EC2Call, left_out, lift, remember, remembered
from raynium.run.protocol import NodeFault, Status
from raynium.storage.store import Store
from raynium.tracking.incidents import Incidents


class BadNodes:
    """Of one driver."""

    def __init__(self, config: Config, run: Store, tell: Callable[[str], None], incidents: Incidents):
        """run: whose folder lies in the root. tell: a line for the user's terminal."""
        self._config, self._tell, self._incidents = config, tell, incidents
        self._call: EC2Call | None = None if config.fault.bad_instance == "keep" else config.fault.bad_instance
        self._root = Store(run.url.rpartition("/")[0])
        # Ids of nodes on which no agent is to be placed, also in a lost one's place.
        self.excluded: list[str] = []
        # By id of the node, of whose instance EC2 is still to be asked.
        self._waiting: dict[str, NodeFault] = {}
        # Ids of instances of which it has been: a reboot that did not help is not repeated.
        self._asked: set[str] = set()
        self._answers: list[tuple[NodeFault, Future[None]]] = []
        self._calls = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ec2")

    def ids(self) -> list[str]:
        """Of the nodes of now that other drivers found bad, as far as the run can do without them."""
        try:
            bad = remembered(self._root, now_unix=time.time(), seconds=self._config.fault.bad_node_seconds)
        except StoreError as error:
            self._tell(f"nodes that earlier runs found bad are not known: {error}")
            return []
        if not bad:
            return []
        fit = fitting_nodes(node_resources(self._config))
        nodes = {node_id: host for node_id, host in node_hosts().items() if node_id in fit}
        found, kept = left_out(bad, nodes, needed=self._config.cluster.seats)
        for each in found.values():
            self._tell(f"node {each.host} is left out, as run {each.run} found: {each.text}")
        if kept:
            self._tell(f"{kept} node(s) that earlier runs found bad are used: there are no others")
        return list(found)

    def passed(self, report: Report) -> None:
        """Of nodes that EC2 rebooted, those that are fit by a preflight of now are good again."""
        try:
            marks = remembered(self._root, now_unix=time.time(), seconds=self._config.fault.bad_node_seconds)
            for node in report.good_nodes:
                if any(mark.is_back(node.node_id, node.host) for mark in marks):
                    lift(self._root, node.host)
                    self._tell(f"node {node.host} was rebooted, passes its preflight, and is admitted again")
        except StoreError as error:
            self._tell(f"nodes that were rebooted stay left out: {error}")

    def are_left(self, new_faults: Sequence[NodeFault], status: Status) -> bool:
        """Whether the agents are to start anew on other nodes, since as many as verdicts have named are free now.

        That costs the snapshots in memory: the run goes on from its newest checkpoint. Staying costs the same again.
        """
        bad = {fault.node_id: fault.host for fault in new_faults if fault.node_id not in self.excluded}
        if not bad:
            return False
        hosts = ", ".join(bad.values())
        if status.has_spares:
            self._tell(f"the run goes on without {hosts}: a spare takes over")
            return False
        if status.waits_for_seats:
            self._tell(f"the run stays on {hosts}: it waits for another node already")
            return False
        taken = [*self.excluded, *(agent.node_id for agent in status.agents)]
        if len(free_nodes(node_resources(self._config), besides=taken)) < len(bad):
            self._tell(f"the run stays on {hosts}: no other node that it could take is free")
            return False
        self.excluded += bad
        self._tell(f"the run leaves {hosts} and goes on on other nodes, from its newest checkpoint")
        return True

    def remember(self, found: NodeFault) -> None:
        """A verdict of this run's."""
        self._mark(found)
        if self._call is not None:
            self._waiting[found.node_id] = found

    def act(self, status: Status) -> None:
        """Asks EC2 to do with the instances of nodes named since as fault.bad_instance says, and tells what came of it.

        Not before the run has left them, if it does, and what it has saved there is in the store. A coordinator that
        was started again, and has heard of no agent yet, does not know.
        """
        idle = [node_id for node_id in self._waiting if status.agents and node_id not in status.busy_nodes]
        self._act([self._waiting.pop(node_id) for node_id in idle], status.step)

    def close(self, *, step: int) -> None:
        """Once the run has ended: what is still to be asked is asked, and answers are waited for."""
        self._act(self._waiting.values(), step)
        self._waiting.clear()
        self._calls.shutdown(wait=bool(self._answers))
        self._act([], step)

    def _act(self, named: Iterable[NodeFault], step: int) -> None:
        """step: of the run, for its incidents."""
        for found in named:
            if (why := self._why_not(found)) is not None:
                self._note(found, f"its instance is kept, though fault.bad_instance is {self._call}: {why}", step)
                continue
            assert found.instance is not None and self._call is not None
            self._asked.add(found.instance.id)
            ask = self._calls.submit(ask_ec2, self._call, instance_id=found.instance.id, region=found.instance.region)
            self._answers.append((found, ask))
        for found, answer in [each for each in self._answers if each[1].done()]:
            self._answers.remove((found, answer))
            self._hear(found, answer, step)

    def _why_not(self, found: NodeFault) -> str | None:
        instance = found.instance
        if instance is None:
            return "it is no EC2 instance, or its metadata service does not answer there: see to it by hand"
        if instance.id in self._asked:
            return f"EC2 was asked to {self._call} {instance.id} before, and it broke again: replace it by hand"
        if found.node_id in own_nodes():
            return "this driver, or the cluster's head, runs there and would end with it: stop the run first"
        if users := users_of(found.node_id):
            return f"it is used by {', '.join(users)} as well: end that first, and see to it by hand"
        return None

    def _hear(self, found: NodeFault, answer: Future[None], step: int) -> None:
        assert found.instance is not None and self._call is not None
        if isinstance(error := answer.exception(), LaunchError):
            return self._note(found, str(error), step)
        answer.result()
        self._mark(found, asked=self._call)
        self._note(found, f"EC2 was asked to {self._call} {found.instance.id}: {found.fault}", step)

    def _note(self, found: NodeFault, text: str, step: int) -> None:
        self._tell(f"node {found.host}: {text}")
        self._incidents.notes("node", where=found.host, cause=text, step=step)

    def _mark(self, found: NodeFault, asked: EC2Call | None = None) -> None:
        try:
            remember(self._root, found, run=self._config.run.name, now_unix=time.time(), asked=asked)
        except StoreError as error:
            self._tell(f"other drivers will not know of {found.host}: {error}")
