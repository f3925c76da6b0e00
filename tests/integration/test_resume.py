"""A run killed with SIGKILL at any moment and resumed ends with exactly the weights of the run that was not."""

import random
import time

import torch
from safetensors.torch import load_file

from halfeven.training.state import load_state

from .running import halfeven, start


def kill_after(process, condition, delay):
    """Wait for a condition, then a little longer, and kill without warning; whether the process was still running."""
    deadline = time.monotonic() + 120
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.01)
    time.sleep(delay)
    running = process.is_alive()
    process.kill()
    process.join()
    return running


def test_killed_and_resumed_equals_uninterrupted(config, trained, tmp_path):
    whole, cut = trained[0], tmp_path / "cut"
    moments = random.Random()
    float_state, state = cut / "float" / "state.pt", cut / "state.pt"
    killed = [
        kill_after(start("train", config, "--work-dir", cut), float_state.is_file, moments.uniform(0, 0.5)),
        kill_after(start("train", config, "--work-dir", cut, "--resume"), state.is_file, moments.uniform(0, 0.3)),
    ]
    # A third time inside the quantized training, at whatever step it has got to then.
    before = load_state(state).step
    process = start("train", config, "--work-dir", cut, "--resume")
    killed.append(
        kill_after(process, lambda: load_state(state).step > before + moments.randrange(12), moments.uniform(0, 0.05))
    )
    assert killed[0], "the first kill came too late to interrupt anything"
    done = halfeven("train", config, "--work-dir", cut, "--resume")
    assert done.returncode == 0, done.stderr

    for name in ("last.safetensors", "best.safetensors", "float/best.safetensors", "float/last.safetensors"):
        first, second = load_file(whole / name), load_file(cut / name)
        assert first.keys() == second.keys()
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different, f"{name}: {different}"
    assert load_state(whole / "state.pt").best == load_state(state).best
    assert not list(cut.rglob("*.partial"))
