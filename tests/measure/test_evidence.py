import pytest

from molehunt.measure.evidence import Evidence
from molehunt.measure.interval import Interval

HIGH, LOW = Interval(0.9, 0.8, 0.95, 50), Interval(0.05, 0.01, 0.1, 50)


def test_a_result_without_a_control_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="TPR of x: a result without its control"):
        Evidence(name="TPR of x", score=HIGH, near_miss=LOW, twin=LOW)
    Evidence(name="x", score=HIGH, chance=LOW)
    Evidence(name="x", score=HIGH, baseline=LOW)


def test_missing_controls_are_named() -> None:
    assert Evidence(name="x", score=HIGH, chance=LOW).unmeasured == ("baseline", "near_miss", "twin")
    assert Evidence(name="x", score=HIGH, chance=LOW, baseline=LOW, near_miss=LOW, twin=LOW).unmeasured == ()


@pytest.mark.parametrize("control", ["chance", "baseline", "near_miss", "twin"])
def test_a_score_stands_above_every_control(control: str) -> None:
    controls = {"chance": LOW, "baseline": LOW, "near_miss": LOW, "twin": LOW}
    assert Evidence(name="x", score=HIGH, **controls).stands
    overlapping = Interval(0.6, 0.3, 0.8, 50)
    assert not Evidence(name="x", score=HIGH, **{**controls, control: overlapping}).stands


@pytest.mark.parametrize("fpr", [0.0, 1.0, -1.0])
def test_a_rate_outside_0_to_1_is_refused(fpr: float) -> None:
    with pytest.raises(ValueError, match="fpr"):
        Evidence(name="x", score=HIGH, chance=LOW, fpr=fpr)
    assert Evidence(name="x", score=HIGH, chance=LOW, fpr=0.01).fpr == 0.01
