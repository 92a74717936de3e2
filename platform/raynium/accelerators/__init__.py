"""The devices this build trains on. Light: importing it loads no torch, because node agents have none."""

from raynium.accelerators.base import Accelerator
from raynium.accelerators.detect import detect

__all__ = ["Accelerator", "detect"]
