"""Every claim's measurements, on a run of two steps: they yield what its verdict reads."""

import json
from pathlib import Path

import pytest

from mythos.claims import runner
from mythos.claims.definition import ClaimSection, load_claim
from mythos.claims.results import rounded

ARMS = {
    "depth-extrapolation": "act",
    "halting": "gate",
    "latent-breadth": "looped",
    "moe-depth-routing": "router-bias",
    "reasoning-depth": "hops-looped",
    "scaling": "small-2",
    "systematic-generalization": "loops-2",
}
"""An arm of each claim that measures its runs."""


@pytest.mark.parametrize("name", ARMS)
def test_a_run_of_two_steps_is_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    claim = load_claim(name)
    values = claim.definition.model_dump(mode="json")
    values["base"]["train"] |= {"steps": 2}
    values["base"]["checkpoint"] = {"every": 1, "keep_every": 1}
    values["base"]["eval"] |= {"every": 0, "batches": 1}
    values["arms"] = {ARMS[name]: {key: value for key, value in claim.arms[ARMS[name]].items() if key != "train.steps"}}
    for options in values["measure"].values():
        options["sequences"] = 8
    if name == "depth-extrapolation":
        values["measure"]["sweep"]["most"] = [2, 64]
    claim = type(claim)(claim.name, claim.size, ClaimSection.model_validate(values))
    [planned] = claim.runs(1, tmp_path / "runs", None)
    taken = runner.train_and_collect(claim, planned, lambda _: None).measured
    assert taken.keys() == claim.measure.keys()
    assert json.loads(json.dumps(taken, allow_nan=False)) == rounded(taken)
    if "sweep" in taken:
        assert all(loop["loss"] > 0 for loop in taken["sweep"]["loops"] if loop["loops"] in (1, 8))
    if name == "depth-extrapolation":
        assert sorted({point["most"] for point in taken["sweep"]["halting"]}) == [2, 64]
    if name == "moe-depth-routing":
        assert 0 <= taken["sweep"]["loops"][1]["expert_overlap"] <= 1
    if name == "halting":
        assert {"convergence", "gate"} <= {point["rule"] for point in taken["sweep"]["halting"]}
        spent = taken["spent"]["gate"]
        assert sum(spent["frequency"]["positions"]) == sum(spent["place"]["positions"]) == 8 * 128
        # Eight sequences of 128: each eighth of the places are 16 columns of every one.
        assert spent["place"]["positions"] == [128] * 8
        assert 1 <= len(spent["sentences"]) <= 4
        for sentence in spent["sentences"]:
            text = "".join(piece for piece, _ in sentence)
            assert text[0] == " " and text[1].isupper() and text.endswith(".")
            assert all(1 <= loops <= 8 for _, loops in sentence)
    if name == "systematic-generalization":
        assert taken["facts"]["steps"] == [1, 2] and len(taken["facts"]["out"]) == 2
    if name == "latent-breadth":
        found = taken["frontier"]
        assert found["chance"] == [0.5, 0.5, 0.5]
        # One of four nodes, and three guesses among the other 7 of the level, of which three are right.
        assert found["depth_first"][1] == pytest.approx((1 + 9 / 7) / 4, rel=1e-4)
        assert all(0 <= value <= 1 for value in found["recall"])
