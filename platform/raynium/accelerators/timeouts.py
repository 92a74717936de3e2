"""How long a rank may be silent, from the inside out. Each limit leaves the one before it room to speak first.

The device's own timeout names the core and the operation; the process group's names the collective; the hang verdict
knows only that nothing came. So the one that knows most must come first.
"""

# NRT_TIMEOUT in the Neuron runtime. Also what a rank waits for its peers inside a collective, while one of them may
# still be compiling: AWS's own examples use 600.
EXECUTION_TIMEOUT_SECONDS = 600
PROCESS_GROUP_TIMEOUT_SECONDS = 900  # of every collective, on all backends
HANG_VERDICT_SECONDS = 1200  # without a step or a change of phase, as the run coordinator counts
