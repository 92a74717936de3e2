"""How long a rank may be silent, from the inside out: the one that knows most must speak first.

The device's own timeout names the core and the operation; the process group's names the collective.
"""

# NRT_TIMEOUT in the Neuron runtime. Also what a rank waits for its peers inside a collective, while one of them may
# still be compiling: AWS's own examples use 600.
EXECUTION_TIMEOUT_SECONDS = 600
# Of every collective, on all backends. Beyond every limit of a verdict (run/verdicts/hangs.py): that one names the rank
# that is behind and keeps its stacks, this one ends the ranks that wait for it.
PROCESS_GROUP_TIMEOUT_SECONDS = 5 * 3600
