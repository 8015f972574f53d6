"""Whether BASE is the model that TUNED was fine-tuned from, and what kind of fine-tune it is.

A fine-tune keeps its base's weights nearly as they were: the entries of each matrix correlate. Matrices of two models that
were trained apart correlate no more than random numbers do. So a wrong base is seen at once, and everything that is measured
against it would be void. Two fine-tunes of one base correlate, too: weights alone do not tell a base from a sibling.

Measured on 456 pairs among the embedded models, SmolLM2, Gemma 3 270M, all of these trained or drawn anew, and their
fine-tunes (LoRA and full, up to a rate that ruins the model; noisy, quantised, resized): the median
correlation of pairs that belong together is 0.59 or more, 0.96 of those trained at usual rates; that of others is 0.002 or less.
Two models that began from the same random weights and were trained apart keep 0.40: they pass for relatives.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from molehunt.audit.weight_samples import MatrixSample, TensorSurvey, group_of, survey
from molehunt.checkpoint.gguf_facts import conversion_facts, formats
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.loader_traps import read_json
from molehunt.checkpoint.reader import Checkpoint
from molehunt.checkpoint.skeleton import skeleton
from molehunt.errors import InvalidInput, NotTestable, printable
from molehunt.model.adapter_fit import AdapterFit, adapter_fit, wrong_base
from molehunt.model.blocks import Part, module_role
from molehunt.run.counting import counted
from molehunt.run.progress import Track, silent

Relation = Literal["identical", "related", "unrelated", "unverified"]
RELATED = 0.3
"""Correlation from which on a matrix counts as derived from the other. Noise as large as the weights leaves 0.7."""
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
"""Settings that a fine-tune shares with its base, except for a resized vocabulary."""
CANDIDATES = "`molehunt files BASE TUNED --bases FOLDER` ranks candidates."


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """What the weights say about a pair."""

    relation: Relation
    why: str
    """The relation in one sentence, with the numbers behind it."""
    kind: str = ""
    """The kind of fine-tune in one sentence; empty where the base is none or nothing can be said."""
    correlation: float | None = None
    """Median over the sampled matrices, 1 for those that did not change; None where none could be compared."""
    relative: float | None = None
    """Median of ‖ΔW‖ / ‖W‖ over the sampled matrices that changed."""
    tensors: int = 0
    """Number of tensors that both models have."""
    changed: int = 0
    unread: int = 0
    """Number of tensors of which nobody can say whether they changed: their quantisation cannot be undone exactly."""
    tokens: tuple[int, int] | None = None
    """Number of tokens with the same id on both sides, and number of tokens of the larger vocabulary."""
    settings: tuple[str, ...] = ()
    """Sizes in the configs that differ: `hidden_size 576, 640`."""
    adapter: bool = False
    """Whether the fine-tune is an adapter, of which shapes alone can be compared."""
    nonfinite: tuple[str, ...] = ()
    """The fine-tune's tensors that hold NaN or infinity."""
    nonfinite_in_base: tuple[str, ...] = ()

    def must_be_related(self) -> None:
        """Raise NotTestable for a base that is not the fine-tune's."""
        if self.relation == "unrelated":
            raise NotTestable(f"{self.why}\nWhatever is measured against it would be void. {CANDIDATES}")

    def lines(self) -> list[str]:
        """The sentences for people."""
        tokens = ""
        if self.tokens is not None and self.tokens[0] < self.tokens[1]:
            tokens = f"{self.tokens[0]} of {self.tokens[1]} tokens have the same id in both vocabularies."
        sizes = f"Configs differ: {'; '.join(self.settings)}." if self.settings else ""
        return [line for line in (self.why, self.kind, sizes, tokens) if line]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


def base_identity(base: Checkpoint, tuned: Checkpoint, track: Track = silent) -> BaseIdentity:
    """Look at both checkpoints' weights, vocabularies and configs. Nothing is loaded or run; one tensor of each is in memory.

    Raises InvalidInput where a folder is broken.
    """
    if tuned.kind == "adapter":
        return _of_adapter(base, tuned)
    seen = survey(base, tuned, track)
    settings, tokens = _sizes(base, tuned), shared_tokens(base.path, tuned.path)
    correlations = _correlations(seen)
    relation, why = _relation(base, tuned, seen, settings)
    return BaseIdentity(
        relation=relation,
        why=why,
        kind=_kind(base, tuned, seen) if relation == "related" else "",
        correlation=round(median(correlations), 4) if correlations else None,
        relative=round(median(s.relative for s in seen.samples), 6) if seen.samples else None,
        tensors=seen.paired,
        changed=len(seen.changed),
        unread=len(seen.unread),
        tokens=tokens,
        settings=settings,
        nonfinite=seen.nonfinite[1],
        nonfinite_in_base=seen.nonfinite[0],
    )


def check_base(base: Checkpoint, tuned: Checkpoint, track: Track = silent) -> None:
    """Raise NotTestable where `base` is not the model that `tuned` was fine-tuned from."""
    base_identity(base, tuned, track).must_be_related()


def _relation(base: Checkpoint, tuned: Checkpoint, seen: TensorSurvey, settings: Sequence[str]) -> tuple[Relation, str]:
    names = f"{printable(model_name(base.path), 60)} is not the base of {printable(model_name(tuned.path), 60)}"
    correlations = _correlations(seen)
    compared = len(correlations) + len(seen.mismatched)
    if not seen.paired:
        none = f"no tensor has the same name in both ({len(base.names())} and {len(tuned.names())})."
        if not settings:  # one architecture and size, saved in two ways
            return "unverified", f"Whether this is the right base was not checked: {none}"
        return "unrelated", f"{names}: {none}"
    if len(seen.mismatched) * 2 > max(compared, 1):
        name, shape, shape_after = seen.mismatched[0]
        return "unrelated", (
            f"{names}: {len(seen.mismatched)} of {seen.paired} tensors have other shapes, such as {printable(name, 80)}: "
            f"{list(shape)} in the base, {list(shape_after)} in the fine-tune."
        )
    if not seen.changed and not seen.alone and not seen.unread:
        return "identical", f"All {seen.paired} tensors are identical: this is the base itself, or a copy of it."
    if not compared and not seen.unsampled and not seen.unread:
        return "related", f"No matrix changed: {len(seen.changed)} of {seen.paired} tensors did, norms or biases."
    if not compared and not seen.unread:
        return "unverified", "Whether this is the right base was not checked: its matrices hold NaN or infinity."
    if not compared:
        return (
            "unverified",
            "Whether this is the right base was not checked: its quantisation cannot be undone exactly.",
        )
    strange = len(seen.mismatched) + sum(one < RELATED for one in correlations)
    middle = median(correlations) if correlations else 0.0
    if strange * 2 > compared:
        return "unrelated", (
            f"{names}: {strange} of {compared} matrices have nothing to do with each other (median correlation {middle:.2f}; "
            f"a fine-tune keeps more than {RELATED})."
        )
    rest = f" {strange} of them have nothing in common with the base's: replaced, or new." if strange else ""
    if seen.unread:
        rest += (
            f" {counted(len(seen.unread), 'tensor')} could not be compared: quantisation that cannot be undone exactly."
        )
    return "related", (
        f"The base fits: its matrices correlate with the fine-tune's by {middle:.4f} (median of {compared}; 0 for other "
        f"models).{rest} A sibling, fine-tuned from the same base, would fit, too."
    )


def _correlations(seen: TensorSurvey) -> list[float]:
    """One number for each matrix that was looked at; 1 for one that did not change."""
    return [sample.correlation for sample in seen.samples] + [1.0] * seen.same


def _kind(base: Checkpoint, tuned: Checkpoint, seen: TensorSurvey) -> str:
    """The kind of fine-tune, in a sentence."""
    groups = Counter(group_of(name, base.model_type) for name in seen.changed)
    roles = [role for name in seen.changed if (role := module_role(name, base.model_type)) is not None]
    parts = sorted({role.part for role in roles}, key=get_args(Part).index)
    layers = {role.layer for role in roles}
    samples = [s for s in seen.samples if group_of(s.name, base.model_type) == "block"] or list(seen.samples)
    where = f"{len(seen.changed)} of {seen.paired} tensors changed"
    named = [f"{', '.join(parts)} in {len(layers)} layers"] if parts else []
    named += ["embeddings or head"] if groups["vocabulary"] else []
    named += [f"{groups['other']} others"] if groups["other"] else []
    where += f" ({'; '.join(named)})" if named else ""
    if seen.unread:
        return f"The kind of change is unknown: {where}; of {len(seen.unread)} nobody can say."
    if not samples:
        compared = [one for one in seen.changed if one not in seen.nonfinite[0] + seen.nonfinite[1]]
        if len(compared) < len(seen.changed):
            rest = f"{len(seen.changed) - len(compared)} of them hold NaN or infinity and cannot be compared"
            return f"The kind of change is unknown: {where}; {rest}."
        return f"Only small tensors: {where}."
    size = f"‖ΔW‖/‖W‖ {median(s.relative for s in samples):.2g} (median)"
    quantised = _quantised(base, "BASE") + _quantised(tuned, "TUNED")
    return f"{_form(samples, set(groups) == {'vocabulary'})}: {where}, {size}.{quantised}"


def _form(samples: Sequence[MatrixSample], vocabulary_alone: bool) -> str:
    forms = Counter(sample.form for sample in samples)
    common, count = forms.most_common(1)[0]
    if vocabulary_alone:
        return "A change of the vocabulary alone"
    if common == "rounding":
        return "A change that is not larger than rounding"
    if common == "unclear" or count * 2 <= len(samples):
        return "A change so close to rounding that its form is unclear"
    ranks = [s for s in samples if s.form == common]
    whole = [s.stable_rank for s in samples if s.stable_rank is not None]
    stable = f"stable rank {median(whole):.3g}" if whole else "stable rank unknown"
    if common == "low rank":
        return f"Like LoRA of rank {max(s.rank for s in ranks)} or less ({stable})"
    return f"Many directions ({stable}): a full fine-tune, a LoRA of high rank, quantisation or noise"


def _quantised(side: Checkpoint, what: str) -> str:
    facts = conversion_facts(side.path)
    return (
        f" {what} was read from a GGUF file ({formats(facts)}): changes within its rounding are not testable."
        if facts
        else ""
    )


def _sizes(base: Checkpoint, tuned: Checkpoint) -> tuple[str, ...]:
    """Sizes and types in the configs that differ."""
    found: list[str] = []
    for key in ("model_type", *SIZES):
        left, right = (side.config.get(key, _text_part(side).get(key)) for side in (base, tuned))
        if left is not None and right is not None and left != right:
            found.append(f"{key} {printable(str(left), 30)}, {printable(str(right), 30)}")
    return tuple(found)


def _text_part(side: Checkpoint) -> dict[str, Any]:
    inner = side.config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def shared_tokens(base: Path, tuned: Path) -> tuple[int, int] | None:
    """Number of tokens with the same id in both tokenizer.json, and of the larger vocabulary; None without both files."""
    sides = [_vocabulary(folder / "tokenizer.json") for folder in (base, tuned)]
    if not sides[0] or not sides[1]:
        return None
    return sum(sides[1].get(token) == number for token, number in sides[0].items()), max(map(len, sides))


def _vocabulary(path: Path) -> dict[str, int]:
    """Token → id. Empty where there is no such file, or it cannot be read; what is broken there is a finding elsewhere."""
    try:
        model = read_json(path).get("model") if path.is_file() else None
    except InvalidInput:
        return {}
    listed: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, dict):
        return {str(token): number for token, number in listed.items() if isinstance(number, int)}
    if isinstance(listed, list):  # Unigram: pairs of a token and its score
        return {str(one[0]): i for i, one in enumerate(listed) if isinstance(one, list) and one}
    return {}


def _of_adapter(base: Checkpoint, adapter: Checkpoint) -> BaseIdentity:
    """An adapter says little about its base: the names and shapes of its factors have to be those of the base's modules."""
    checked = "nothing of it was checked: transformers builds no model that continues a text from its config"
    fit = AdapterFit(modules=0, why_not="")
    try:
        fit = adapter_fit(skeleton(base.path), adapter.path)
        checked = f"the shapes of its {counted(fit.modules, 'module')} fit" if fit.modules else "only names are checked"
    except NotTestable:
        pass  # later steps say more
    if fit.why_not:
        return BaseIdentity(relation="unrelated", why=wrong_base(base.path, adapter.path, fit), adapter=True)
    named = adapter.config.get("base_model_name_or_path")
    said = f" It names {printable(repr(named), 80)} as its base." if isinstance(named, str) and named else ""
    return BaseIdentity(
        relation="unverified",
        why=f"An adapter holds no weights of its base, so the base cannot be verified; {checked}.{said}",
        adapter=True,
    )
