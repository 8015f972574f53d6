"""Reading and editing activations at sites, with plain torch hooks inside context managers.

The most dangerous failure is a hook that does not fire, because nothing else shows it. So firings are compared with the
number of forward passes, and a model that hooks cannot see is refused.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molehunt.contracts import Intervention
from molehunt.errors import CannotTap
from molehunt.model.blocks import attn_module, decoder, decoder_blocks, mlp_module, unwrapped
from molehunt.site import Site

_ACTIVE: "WeakKeyDictionary[nn.Module, tuple[tuple[Intervention, ...], str | None]]" = WeakKeyDictionary()
"""Active edits of each decoder; see `active_edits`."""
_DEPTH: ContextVar[int] = ContextVar("_DEPTH", default=0)
"""Number of open `without_hooks` blocks."""


@contextmanager
def without_hooks() -> Generator[None, None, None]:
    """Hide passes inside the block from all hooks of Molehunt except those that were entered inside it.

    It is meant for a pass that only inspects the model, while other hooks count, record or gate its passes.
    """
    token = _DEPTH.set(_DEPTH.get() + 1)
    try:
        yield
    finally:
        _DEPTH.reset(token)


def live(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook`, changed to do nothing inside a `without_hooks` block that is entered later."""
    made = _DEPTH.get()

    @wraps(hook)
    def called(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if _DEPTH.get() == made else None

    return called


class _AllSitesRead(BaseException):
    """Ends a forward pass once every site was read. It never leaves `read_sites`."""


class Tap:
    """Activations of the latest forward pass, by site."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self.acts: dict[Site, Tensor] = {}
        self.firings: Counter[Site] = Counter(dict.fromkeys(sites, 0))
        """Number of times that each site's hook ran."""

    def __getitem__(self, site: Site) -> Float[Tensor, "batch pos d_model"]:
        """Activations at a site. Raises KeyError for a site that is not read, CannotTap if no forward pass reached it."""
        if site not in self.firings:
            raise KeyError(f"{site} was not asked for; asked for: {', '.join(map(str, self.firings))}")
        if site not in self.acts:
            raise CannotTap(f"no forward pass of this model has reached {site}, so there is nothing to read there.")
        return self.acts[site]


class Edits:
    """Counts the calls of a set of interventions."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self.firings: Counter[Site] = Counter(dict.fromkeys(sites, 0))
        """Number of times that each site's hook ran."""


@contextmanager
def read_sites(
    model: nn.Module, sites: Iterable[Site], *, stop_early: bool = False, layers_path: str | None = None
) -> Generator[Tap, None, None]:
    """Record the activations at `sites` in every forward pass inside the block. The latest pass replaces earlier ones.

    A read inside an edit of the same site sees the edited activations.

    Args:
        model: a causal language model, with or without a PEFT wrapper.
        sites: the sites to read.
        stop_early: whether to run nothing after the deepest site. The `with` body ends at that forward pass, and the
            statements after it do not run.
        layers_path: see `decoder_blocks`.

    Raises:
        CannotTap: the model is compiled, lacks such a site, or ran a forward pass without calling it.

    Example:
        >>> with read_sites(model, [Site(3)]) as tap:  # doctest: +SKIP
        ...     model(input_ids=tokens)
        >>> tap[Site(3)].shape  # batch, positions, d_model  # doctest: +SKIP
    """
    wanted = tuple(dict.fromkeys(sites))
    tap = Tap(wanted)
    modules = _modules_at(model, wanted, layers_path)
    stop = _AllSitesRead()

    def hook_at(site: Site) -> Callable[[nn.Module, Any, Any], None]:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            tap.firings[site] += 1
            tap.acts[site] = _acts_of(output).clone()  # a later in-place sum would change the activations
            if stop_early and all(tap.firings.values()):
                raise stop

        return read

    try:
        with _hooked(model, [(modules[site], hook_at(site)) for site in wanted], tap.firings):
            yield tap
    except _AllSitesRead as raised:
        if raised is not stop:
            raise


@contextmanager
def observe_sites(
    model: nn.Module, observers: Mapping[Site, Callable[[Tensor], None]], *, layers_path: str | None = None
) -> Generator[None, None, None]:
    """Pass each observer the activations [batch pos d_model] at its site in every forward pass, without a copy.

    An observer must not store or change the tensor, because later blocks may write into it.

    Raises:
        CannotTap: see `read_sites`.
    """
    firings: Counter[Site] = Counter(dict.fromkeys(observers, 0))
    modules = _modules_at(model, observers, layers_path)

    def hook_at(site: Site) -> Callable[[nn.Module, Any, Any], None]:
        def observe(module: nn.Module, args: Any, output: Any) -> None:
            firings[site] += 1
            observers[site](_acts_of(output))

        return observe

    with _hooked(model, [(modules[site], hook_at(site)) for site in observers], firings):
        yield


@contextmanager
def edit_sites(
    model: nn.Module, interventions: Sequence[Intervention], *, layers_path: str | None = None
) -> Generator[Edits, None, None]:
    """Apply interventions in every forward pass inside the block, in prefill and in every cached step.

    Interventions at the same site act in the given order.

    Args:
        model: a causal language model, with or without a PEFT wrapper.
        interventions: edits of the activations at their sites.
        layers_path: see `decoder_blocks`.

    Raises:
        CannotTap: the model is compiled, lacks such a site, or ran a forward pass without calling it.

    Example:
        >>> with edit_sites(model, [intervention]):  # doctest: +SKIP
        ...     logits = model(input_ids=tokens).logits
    """
    at: dict[Site, list[Intervention]] = {}
    for intervention in interventions:
        at.setdefault(intervention.site, []).append(intervention)
    edits = Edits(at)
    modules = _modules_at(model, at, layers_path)

    def hook_at(site: Site) -> Callable[[nn.Module, Any, Any], Any]:
        def edit(module: nn.Module, args: Any, output: Any) -> Any:
            edits.firings[site] += 1
            edited = acts = _acts_of(output)
            for intervention in at[site]:
                edited = intervention(edited)
            if edited is acts:
                return None  # torch leaves the output as it is
            if edited.shape != acts.shape or edited.dtype != acts.dtype:
                raise ValueError(
                    f"{type(at[site][-1]).__name__} at {site} turned {acts.dtype} {tuple(acts.shape)} "
                    f"into {edited.dtype} {tuple(edited.shape)}; an intervention must keep both"
                )
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit

    inner = decoder(model)
    before = _ACTIVE.get(inner, ((), None))
    _ACTIVE[inner] = ((*before[0], *interventions), layers_path or before[1])
    try:
        with _hooked(model, [(modules[site], hook_at(site)) for site in at], edits.firings):
            yield edits
    finally:
        _ACTIVE[inner] = before


def active_edits(model: nn.Module) -> tuple[tuple[Intervention, ...], str | None]:
    """The interventions of all open `edit_sites` blocks of this model, and the path of its blocks if one was given."""
    return _ACTIVE.get(decoder(model), ((), None))


@contextmanager
def _hooked(
    model: nn.Module,
    hooks: list[tuple[nn.Module, Callable[[nn.Module, Any, Any], Any]]],
    firings: Counter[Site],
) -> Generator[None, None, None]:
    """Add hooks inside the block and remove them after it. Finished forward passes are compared with the firings."""
    passes: Counter[int] = Counter()

    def count(module: nn.Module, args: Any, output: Any) -> None:
        passes[id(module)] += 1

    handles: list[RemovableHandle] = []
    try:
        # PEFT calls the model's `forward` and not the model, so passes are counted in three places
        for module in {id(m): m for m in (model, unwrapped(model), decoder(model))}.values():
            handles.append(module.register_forward_hook(live(count)))
        for module, hook in hooks:
            handles.append(module.register_forward_hook(live(hook)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    ended = max(passes.values(), default=0)
    for site, fired in firings.items():
        if fired < ended:
            raise CannotTap(
                f"{site} was called {fired} times in {ended} forward passes of {type(model).__name__}: "
                "the model does not call its blocks as modules, or replays a recorded graph.\n"
                "Its activations cannot be read or edited with hooks."
            )


def _modules_at(model: nn.Module, sites: Iterable[Site], layers_path: str | None) -> dict[Site, nn.Module]:
    _refuse_compiled(model)
    blocks = decoder_blocks(model, layers_path)
    found: dict[Site, nn.Module] = {}
    for site in sites:
        if site.layer >= len(blocks):
            raise CannotTap(f"there is no {site}: the model has {len(blocks)} blocks, L0 to L{len(blocks) - 1}.")
        block = blocks[site.layer]
        if site.stream == "resid":
            found[site] = block
        else:
            found[site] = attn_module(block) if site.stream == "attn" else mlp_module(block)
    return found


def _acts_of(output: Any) -> Tensor:
    """The output of a module, or its first part: some blocks and all attention modules return tuples."""
    acts = output[0] if isinstance(output, tuple) else output
    if not isinstance(acts, Tensor) or acts.ndim != 3:
        raise CannotTap(f"a tapped module returned {type(output).__name__}, not activations [batch pos d_model].")
    return acts


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        in_place = getattr(module, "_compiled_call_impl", None) is not None  # by module.compile()
        if in_place or name.rpartition(".")[2] == "_orig_mod":  # inside what torch.compile(module) returned
            raise CannotTap(
                f"{type(module).__name__} is compiled: hooks run when it is traced and not when it is called.\n"
                "Give the model as it was before torch.compile."
            )
