"""Prompt positions named by what they are to the trigger: prompts have different lengths, so numbers would not compare."""

from collections.abc import Sequence

from molehunt.steer.patch import differing

TRIGGER_ROLES = 3
"""More trigger tokens than these are cut into this many parts: each role costs a sweep."""

Role = tuple[tuple[int, ...], ...]
"""Positions in each prompt; none where it has no such token."""


def position_roles(
    triggered: Sequence[Sequence[int]], contrast: Sequence[Sequence[int]], triggers: Sequence[Sequence[int]]
) -> dict[str, Role]:
    """Each trigger token alone, then the first token behind the trigger, the last of the prompt, and all between those.

    Tokens in front of the first that differs are left out, those of the trigger included: both prompts have the same
    activations there. The last prompt token, where the answer is decided, is nothing else, wherever it stands.

    Args:
        triggered: token ids of prompts with the trigger.
        contrast: token ids of the same prompts with a harmless trigger of as many tokens.
        triggers: positions of each pair's trigger, ascending, such as `trigger_positions`.

    Returns:
        Positions by role, in the order of the prompt. Where more than `TRIGGER_ROLES` trigger tokens differ, or not as
        many in each prompt, they are cut into parts of like size. A role that no prompt has is left out.

    Raises:
        UsageError: a pair of prompts has unequal lengths or is equal (see `differing`).
        ValueError: a trigger that ends before the prompts differ.
    """
    lasts = [len(prompt) - 1 for prompt in triggered]
    first = [differing(*pair)[0] for pair in zip(triggered, contrast, strict=True)]
    if any(at[-1] < start for at, start in zip(triggers, first, strict=True)):
        raise ValueError("a trigger ends before the prompts differ")
    marked = [tuple(i for i in at if start <= i < last) for at, start, last in zip(triggers, first, lasts, strict=True)]
    parts = max(1, min(TRIGGER_ROLES, *map(len, marked)))
    named = {(len(whole), len(some)) for whole, some in zip(triggers, marked, strict=True)}
    roles: dict[str, Role] = {
        _name(part, parts, named): tuple(
            some[len(some) * part // parts : len(some) * (part + 1) // parts] for some in marked
        )
        for part in range(parts)
    }
    behind = [range(at[-1] + 1, last) for at, last in zip(triggers, lasts, strict=True)]
    roles["first token behind"] = tuple(tuple(rest[:1]) for rest in behind)
    roles["others behind"] = tuple(tuple(rest[1:]) for rest in behind)
    roles["last prompt token"] = tuple((last,) for last in lasts)
    return {name: role for name, role in roles.items() if any(role)}


def _name(part: int, parts: int, counts: set[tuple[int, int]]) -> str:
    """A number where it is the same token in every prompt. `counts`: trigger tokens, and how many of them are patched."""
    if len(counts) > 1:
        return f"trigger, part {part + 1} of {parts}"
    ((n, some),) = counts
    first, last = n - some + some * part // parts + 1, n - some + some * (part + 1) // parts
    return f"trigger token {first} of {n}" if first == last else f"trigger tokens {first}-{last} of {n}"
