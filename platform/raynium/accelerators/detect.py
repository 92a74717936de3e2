"""Chooses the accelerator that a config names, or the one this machine has."""

from pathlib import Path

from raynium.accelerators.base import Accelerator
from raynium.accelerators.cpu import CpuAccelerator
from raynium.accelerators.cuda import CudaAccelerator
from raynium.errors import ConfigError, LaunchError


def detect(name: str, *, device_folder: Path = Path("/dev")) -> Accelerator:
    """`cluster.accelerator` → its implementation. Looks at device files only, since agents have no torch.

    "auto" takes the GPU if there is one, else the CPU; a machine with Neuron devices is an error rather than a slow
    run on its CPU. device_folder: where the kernel lists devices.
    Raises ConfigError for an accelerator this build lacks, LaunchError for one this machine lacks.
    """
    gpus = sorted(device_folder.glob("nvidia[0-9]*"))
    match name:
        case "cpu":
            return CpuAccelerator()
        case "cuda":
            if not gpus:
                raise LaunchError(
                    f"cluster.accelerator is 'cuda', but this machine has no GPU ({device_folder}/nvidia0): set it to "
                    "'auto' or 'cpu', or check that the NVIDIA driver is loaded and the container may use it"
                )
            return CudaAccelerator()
        case "auto":
            if any(device_folder.glob("neuron[0-9]*")):
                raise LaunchError(
                    f"cluster.accelerator is 'auto' and this machine has Neuron devices ({device_folder}/neuron0), "
                    "which this build cannot use (it has cpu and cuda): set it to 'cpu' to train on the machine's CPU"
                )
            return CudaAccelerator() if gpus else CpuAccelerator()
        case _:
            raise ConfigError(
                [f"cluster.accelerator is {name!r}, but this build has cpu and cuda: set it to auto, cpu or cuda"]
            )
