"""A driver that ends while Ray Train still waits for a place for an agent that is not needed any more."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(200)]

DRIVER = """
import threading, time
import ray
from raynium.launch.connect import connect
from raynium.launch.nodes import end_controllers

@ray.remote(num_cpus=0)
class TrainController:
    def run(self):
        time.sleep(1000)

def fit():
    controller = TrainController.remote()
    try:
        ray.get(controller.run.remote())
    finally:
        # Ray Train asks for more.
        ray.get(controller.run.remote())

with connect(None):
    fitting = threading.Thread(target=fit, daemon=True)
    fitting.start()
    time.sleep(3)
    end_controllers()
    fitting.join(60)
    assert not fitting.is_alive()
print("all is said")
"""


def test_a_driver_whose_ray_train_still_waits_ends_as_it_should() -> None:
    ran = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0 and "all is said" in ran.stdout, ran.stderr
    assert "has already been shutdown" not in ran.stderr + ran.stdout
