"""What one command makes of one pair of folders, and the rule by which an answer counts as wrong."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from experiments.what_is_read.case import Saving
from experiments.what_is_read.command import Ran

Status = Literal["works", "NOT TESTABLE", "refused", "WRONG"]
BY_CODE: dict[int, Status] = {2: "refused", 3: "NOT TESTABLE", 4: "refused"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the table."""

    status: Status
    why: str = ""
    """The reason that the command gave, or what is wrong with its answer."""
    output: str = ""
    """What a wrong command printed."""
    numbers: tuple[float, ...] = ()
    """What was measured on the models' answers: the same weights saved in another way have to give the same."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def wrong(why: str, *ran: Ran) -> Cell:
    return Cell(status="WRONG", why=why, output="\n\n".join(one.shown() for one in ran)[:6000])


def no_answer(ran: Ran, command: str, saving: Saving, *, no_decoder: bool) -> Cell | None:
    """The cell of a command that gave no result, which is wrong where it should have; None where it gave one."""
    if ran.fault:
        return wrong(ran.fault, ran)
    status = BY_CODE.get(ran.code)
    if status is None or ran.payload.get("error") is None:
        return None
    if "Usage:" in ran.err:
        return wrong("the command line is wrong", ran)
    if command in saving.may or (no_decoder and command in ("directions", "read", "audit", "watch")):
        return Cell(status=status, why=ran.reason)
    return wrong(f"{status} where it should work: {ran.reason}", ran)
