"""Global random generators continue where they were."""

import json
import random

import numpy as np
import torch

from mythos.training.rng import random_state, set_random_state


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_draws_continue_through_json() -> None:
    for _ in range(3):
        draw()  # an odd number of normal draws leaves one kept for the next
    state = json.loads(json.dumps(random_state()))
    expected = [draw() for _ in range(3)]
    assert expected[0] != expected[1]
    set_random_state(state)
    assert [draw() for _ in range(3)] == expected
