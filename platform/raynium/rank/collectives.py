"""torch's flight recorder: which collectives this rank has come to. Written for NCCL, and kept by gloo too.

`TORCH_FR_BUFFER_SIZE`, which the accelerator sets, says how many it remembers.
"""

import sys


def collectives() -> str:
    """The record as JSON; "" while there is none. Any thread."""
    if "torch" not in sys.modules:
        return ""
    from torch._C import _distributed_c10d as c10d

    # includeCollectives, onlyActive.
    record: bytes = c10d._dump_fr_trace_json(True, False)  # pyright: ignore[reportAttributeAccessIssue]
    return record.decode()
