"""One node's probe in a process of its own, as `preflight_cluster.py` runs it in a Ray actor, but without Ray.

The template that ranks are forked from keeps the environment it was started with, so the Neuron twin needs this.
stdin: {"config", "probes", "seconds"}; the last line of stdout: the checks.
"""

import json
import sys

from raynium.node.preflight import NodeProbe


def main() -> None:
    given = json.load(sys.stdin)
    probe = NodeProbe(given["config"], given["probes"])
    checks = [*probe.look(), *probe.trial_here("127.0.0.1", given["seconds"])]
    sys.stdout.write(json.dumps([check.to_json() for check in checks]) + "\n")


if __name__ == "__main__":
    main()
