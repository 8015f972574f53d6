"""Pairs the tensors of two model folders as loaders take them, whatever each folder calls and joins them."""

from dataclasses import replace
from functools import partial

from molehunt.audit.fused_experts import ExpertMatrix, LastParameter, expert_names, is_fused
from molehunt.audit.tensor_rows import RowMaker, given, start_row, tensor_row
from molehunt.checkpoint.loaded_view import LoadedView
from molehunt.model.blocks import module_role


def loaded_rows(base: LoadedView, tuned: LoadedView) -> dict[str, RowMaker]:
    """Tensor name → its comparison.

    Where both folders store a parameter in the same tensors, these are compared under their own names. Elsewhere the
    parameters are compared, and a parameter of all experts is compared one expert at a time. A tensor that loaders do not
    read is named.
    """
    found: dict[str, RowMaker] = {}
    last = LastParameter(), LastParameter()
    for name in sorted({*base.names(), *tuned.names()}):
        ours, theirs = (view.tied.get(name, name) for view in (base, tuned))
        if ours not in base.names() or theirs not in tuned.names():
            side = "the base" if ours in base.names() else "the fine-tune"
            role = module_role(name, base.checkpoint.model_type)
            found[name] = partial(given, replace(start_row(name, role), status="not testable", why=f"only in {side}"))
        elif ours == theirs == name and base.sources(name) == tuned.sources(name):
            found.update(_same_layout(base, tuned, name, last))
        else:
            found.update(_parameter(base, tuned, name, ours, theirs, last))
    return found | _unread(base, tuned)


def _same_layout(
    base: LoadedView, tuned: LoadedView, name: str, last: tuple[LastParameter, LastParameter]
) -> dict[str, RowMaker]:
    """Rows of the stored tensors that both folders make the parameter of."""
    kind, left, right = base.checkpoint.model_type, base.checkpoint, tuned.checkpoint
    if base.group(name).renamed and is_fused(name, base.shape(name)):
        return _parameter(base, tuned, name, name, name, last)
    return {one: partial(tensor_row, left, right, one, one, module_role(one, kind)) for one in base.sources(name)}


def _parameter(
    base: LoadedView,
    tuned: LoadedView,
    name: str,
    ours: str,
    theirs: str,
    last: tuple[LastParameter, LastParameter],
) -> dict[str, RowMaker]:
    """Rows of a parameter that the folders store in two ways, or of its experts."""
    role = module_role(name, base.checkpoint.model_type)
    shape = base.shape(ours)
    if not is_fused(name, shape) or shape != tuned.shape(theirs):
        return {name: partial(tensor_row, base, tuned, ours, theirs, role, shown=name)}
    return {
        one: partial(
            tensor_row,
            ExpertMatrix(base, ours, number, last[0]),
            ExpertMatrix(tuned, theirs, number, last[1]),
            one,
            one,
            role,
        )
        for number, one in enumerate(expert_names(name, shape[0]))
    }


def _unread(base: LoadedView, tuned: LoadedView) -> dict[str, RowMaker]:
    """Stored tensors that transformers does not load: compared where both folders have them, and named otherwise."""
    found: dict[str, RowMaker] = {}
    left, right = base.checkpoint, tuned.checkpoint
    for name in sorted({*base.unread, *tuned.unread}):
        shown = f"{name} (not loaded)" if name in {*base.names(), *tuned.names()} else name
        row = start_row(shown, None)
        if name in base.unread and name in tuned.unread and left.shape(name) == right.shape(name):
            found[shown] = partial(tensor_row, left, right, name, name, None, shown=shown)
        else:
            side = "both, in two shapes" if name in base.unread and name in tuned.unread else "one folder"
            why = f"not loaded by transformers; in {side}"
            found[shown] = partial(given, replace(row, status="not testable", why=why))
    return found
