import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import good_folder, lora_folder
from molehunt.audit.base_identity import BaseIdentity, base_identity
from molehunt.audit.files import compare_folders
from molehunt.audit.weight_samples import survey
from molehunt.checkpoint.reader import Checkpoint
from molehunt.cli.main import main
from molehunt.errors import NotTestable
from molehunt.organism.seed_model import SEED_MODELS, seed_path
from molehunt.workflows.audit import audit
from molehunt.workflows.watch_target import open_target

Tensors = dict[str, torch.Tensor]
SEED = seed_path("seed-s")


def seen(base: Path, tuned: Path) -> BaseIdentity:
    return base_identity(Checkpoint.open(base), Checkpoint.open(tuned))


def edited(folder: Path, into: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a folder with other weights."""
    shutil.copytree(folder, into)
    save_file(change(load_file(into / "model.safetensors")), into / "model.safetensors", metadata={"format": "pt"})
    return into


def fine_tuned(folder: Path, into: Path, *, lr: float, steps: int = 12, rank: int | None = None) -> Path:
    """A fine-tune by Adam on repeated random tokens: of all weights, or of a LoRA adapter that is merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if rank is not None:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", lora_alpha=2 * rank))
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    rows = torch.randint(3, 90, (4, 24))
    for _ in range(steps):
        model(rows, labels=rows).loss.backward()
        adam.step()
        adam.zero_grad()
    whole = model.merge_and_unload() if rank is not None else model
    whole.to(torch.bfloat16).save_pretrained(into)
    return into


TRUE = {
    "full": lambda root: fine_tuned(SEED, root, lr=1e-3),
    "full, far too fast": lambda root: fine_tuned(SEED, root, lr=1e-2),
    "LoRA, merged": lambda root: fine_tuned(SEED, root, lr=5e-3, rank=4),
    "noise as large as the weights": lambda root: edited(SEED, root, noisy),
    "in fp32": lambda root: edited(SEED, root, lambda t: {n: v.float() * 1.001 for n, v in t.items()}),
    "more tokens": lambda root: edited(SEED, root, resized),
    "one layer from elsewhere": lambda root: edited(SEED, root, one_layer_from_elsewhere),
    "in a wrapper": lambda root: edited(SEED, root, wrapped),
}


def noisy(tensors: Tensors) -> Tensors:
    torch.manual_seed(5)
    return {
        n: (v.float() + torch.randn(v.shape) * v.float().std()).to(v.dtype) if v.ndim == 2 else v
        for n, v in tensors.items()
    }


def resized(tensors: Tensors) -> Tensors:
    name = "model.embed_tokens.weight"
    return {**tensors, name: torch.cat([tensors[name] * 1.01, torch.randn(16, tensors[name].shape[1]).bfloat16()])}


def one_layer_from_elsewhere(tensors: Tensors) -> Tensors:
    return {n: torch.randn(v.shape).to(v.dtype) if ".layers.1." in n else v for n, v in tensors.items()}


def wrapped(tensors: Tensors) -> Tensors:
    changed = noisy(tensors)
    return {n.replace("model.", "model.language_model.", 1): v for n, v in changed.items()}


@pytest.mark.parametrize("make", TRUE.values(), ids=TRUE)
def test_no_true_base_is_called_wrong(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    found = seen(SEED, make(tmp_path / "tuned"))
    assert found.relation == "related", found.why
    assert found.correlation is not None
    assert found.correlation > 0.5
    found.must_be_related()


def test_two_fine_tunes_of_one_base_fit_and_the_sentence_says_that_siblings_do(tmp_path: Path) -> None:
    one, other = fine_tuned(SEED, tmp_path / "a", lr=3e-3), fine_tuned(SEED, tmp_path / "b", lr=5e-3, rank=4)
    found = seen(one, other)
    assert found.relation == "related"
    assert "A sibling, fine-tuned from the same base, would fit, too." in found.why


def another_seed(root: Path) -> Path:
    """The architecture of seed-s with other weights of its own, and half of its bytes: norms are alike."""
    from dataclasses import replace

    model: Any = replace(SEED_MODELS["seed-s"], seed=77).build()
    shutil.copytree(SEED, root)
    model.to(torch.bfloat16).save_pretrained(root)
    return root


WRONG = {
    "another seed": another_seed,
    "another size": lambda root: seed_path("seed-m"),
    "another family": lambda root: seed_path("seed-x"),
    "a fine-tune of another": lambda root: fine_tuned(seed_path("seed-m"), root, lr=1e-3, steps=2),
    "tied with other names": lambda root: good_folder(root, "gpt2"),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_every_other_model_is_called_a_wrong_base(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    other = make(tmp_path / "other")
    for base, tuned in ((SEED, other), (other, SEED)):
        found = seen(base, tuned)
        assert found.relation == "unrelated", found.why
        assert found.kind == ""
        with pytest.raises(NotTestable, match=r"is not the base of .*\n.*--bases"):
            found.must_be_related()


def test_permuted_rows_are_another_models(tmp_path: Path) -> None:
    """The same numbers in another order explain nothing: ΔW is as large as between strangers."""

    def permuted(tensors: Tensors) -> Tensors:
        return {n: v[torch.randperm(len(v))] if v.ndim == 2 else v for n, v in tensors.items()}

    assert seen(SEED, edited(SEED, tmp_path / "permuted", permuted)).relation == "unrelated"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (
            TRUE["full, far too fast"],
            r"^Many directions \(stable rank [\d.]+\): a full fine-tune, .* or noise: 56 of 56 tensors changed \(q, k, v, o,",
        ),
        (
            TRUE["LoRA, merged"],
            r"^Like LoRA of rank [34] or less.*: 42 of 56 tensors changed \(q, k, v, o, gate, up, down in 6",
        ),
        (TRUE["more tokens"], r"^A change of the vocabulary alone: 1 of 56 tensors changed \(embeddings or head\)"),
        (
            lambda root: edited(SEED, root, lambda t: {n: v * 1.1 if v.ndim == 1 else v for n, v in t.items()}),
            r"^Only small tensors: 13 of 56 tensors changed \(13 others\)",
        ),
        (
            lambda root: edited(
                SEED,
                root,
                lambda t: {n: v.float() + 1e-4 * v.float().std() * torch.randn(v.shape) for n, v in t.items()},
            ),
            r"^A change that is not larger than rounding",
        ),
    ],
    ids=["full", "LoRA", "vocabulary", "norms", "rounding"],
)
def test_the_kind_of_fine_tune_is_said(tmp_path: Path, make: Callable[[Path], Path], kind: str) -> None:
    found = seen(SEED, make(tmp_path / "tuned"))
    assert re.search(kind, found.kind), found.kind


def test_an_encoders_matrices_are_not_called_vocabulary(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model: Any = BertModel(config)
    model.save_pretrained(tmp_path / "base")
    model.encoder.layer[0].attention.self.query.weight.data += 0.02 * torch.randn(32, 32)
    model.save_pretrained(tmp_path / "tuned")
    found = seen(tmp_path / "base", tmp_path / "tuned")
    assert found.relation == "related"
    assert re.search(r"^Many directions.*\(1 others\)", found.kind), found.kind


def test_a_change_of_one_number_anywhere_is_counted(tmp_path: Path) -> None:
    def one_number(tensors: Tensors) -> Tensors:
        tensors["model.embed_tokens.weight"][1037, 5] += 1
        return tensors

    looked = survey(Checkpoint.open(SEED), Checkpoint.open(edited(SEED, tmp_path / "tuned", one_number)))
    assert looked.changed == ("model.embed_tokens.weight",)
    assert survey(Checkpoint.open(SEED), Checkpoint.open(SEED)).changed == ()


def test_a_copy_is_identical_and_an_adapters_base_is_unverified(tmp_path: Path) -> None:
    base = good_folder(tmp_path / "base")
    assert seen(base, shutil.copytree(base, tmp_path / "copy")).relation == "identical"
    adapter = lora_folder(tmp_path / "adapter")
    found = seen(base, adapter)
    assert found.relation == "unverified"
    assert "cannot be verified" in found.why
    found.must_be_related()


def test_files_directions_audit_and_watch_do_not_go_on_with_a_wrong_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = another_seed(tmp_path / "other")
    with pytest.raises(SystemExit) as ended:
        main(["files", str(SEED), str(other), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert (ended.value.code, printed["exit_code"], printed["verdict"]) == (3, 3, "NOT TESTABLE")
    assert printed["identity"]["relation"] == "unrelated"
    with pytest.raises(SystemExit) as ended:
        main(["directions", str(SEED), str(other)])
    assert ended.value.code == 3
    assert "is not the base of other" in capsys.readouterr().err
    with pytest.raises(NotTestable, match="is not the base of other"):
        audit(SEED, other, out=tmp_path / "run")
    with pytest.raises(NotTestable, match="is not the base of other"):
        open_target(SEED, other, clean=None, clean_rows=400, fpr=0.05, max_new_tokens=4)


def test_candidates_are_ranked_by_how_far_the_weights_moved(tmp_path: Path) -> None:
    tuned = fine_tuned(SEED, tmp_path / "tuned", lr=1e-3)
    models = tmp_path / "models"
    sibling = fine_tuned(SEED, models / "sibling", lr=5e-3)
    another_seed(models / "stranger")
    (models / "notes").mkdir()

    found = compare_folders(seed_path("seed-m"), tuned, bases=[models, SEED])

    assert [one.name for one in found.bases] == ["seed-s", "sibling", "stranger", "seed-m"]
    assert [one.identity.relation for one in found.bases] == ["related", "related", "unrelated", "unrelated"]
    assert found.bases[1].folder == str(sibling)
    lines = found.to_table().splitlines()
    assert lines[0].startswith("NOT TESTABLE")
    ranked = [line.split()[0] for line in lines if line.endswith("related")]
    assert ranked == ["seed-s", "sibling", "stranger", "seed-m"]
    assert " seed-s is nearer: use it as BASE." in " ".join(lines[:3])


def test_a_base_is_only_called_farther_where_another_one_clearly_is_nearer(tmp_path: Path) -> None:
    tuned = edited(SEED, tmp_path / "tuned", noisy)

    def a_bit_nearer(tensors: Tensors) -> Tensors:
        after = load_file(tuned / "model.safetensors")
        moved = {n: v.float() + 0.005 * (after[n].float() - v.float()) for n, v in tensors.items()}
        return {n: v.to(tensors[n].dtype) for n, v in moved.items()}

    def halfway(tensors: Tensors) -> Tensors:
        after = load_file(tuned / "model.safetensors")
        return {n: ((v.float() + after[n].float()) / 2).to(v.dtype) for n, v in tensors.items()}

    twin, sibling = edited(SEED, tmp_path / "twin", a_bit_nearer), edited(SEED, tmp_path / "sibling", halfway)
    close = compare_folders(SEED, tuned, bases=[twin])
    assert "nearer" not in close.to_table()
    assert close.to_table().count("related, too close to tell") == 2
    far = compare_folders(SEED, tuned, bases=[sibling]).to_table()
    assert "sibling is nearer: use it as BASE." in " ".join(far.split("\n")[:2])
    assert "too close" not in far
    assert "nearer" not in compare_folders(sibling, tuned, bases=[SEED, tuned]).to_table(), "a copy explains nothing"


def test_the_stable_rank_is_that_of_whole_matrices(tmp_path: Path) -> None:
    looked = survey(Checkpoint.open(SEED), Checkpoint.open(edited(SEED, tmp_path / "tuned", noisy)))
    before, after = (load_file(folder / "model.safetensors") for folder in (SEED, tmp_path / "tuned"))
    assert len(looked.samples) > 30
    for sample in looked.samples:
        values = torch.linalg.svdvals(after[sample.name].float() - before[sample.name].float())
        assert sample.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=0.05)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_in_weights_are_a_finding(tmp_path: Path, value: float) -> None:
    names = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")

    def broken(tensors: Tensors) -> Tensors:
        for name in names:
            tensors[name].view(-1)[3] = value
        return tensors

    found = compare_folders(SEED, edited(SEED, tmp_path / "tuned", broken))
    assert (found.verdict, found.exit_code) == ("FLAGGED-CORRELATIONAL", 1)
    (row,) = (row for row in found.rows if row.key == "NaN or infinity")
    assert (
        row.why == f"2 tensors of TUNED hold NaN or infinity ({', '.join(names)}): answers of this model would be void"
    )
    assert "Only small tensors" not in found.to_table()


def test_of_tensors_stored_twice_the_copy_that_loaders_take_is_looked_at(tmp_path: Path) -> None:
    """With and without the prefix: the base's own weights are there for who looks, and strangers' are loaded."""
    stranger = load_file(another_seed(tmp_path / "other") / "model.safetensors")

    def doubled(tensors: Tensors) -> Tensors:
        return {**tensors, **{name.removeprefix("model."): value.clone() for name, value in stranger.items()}}

    assert seen(SEED, edited(SEED, tmp_path / "doubled", doubled)).relation == "unrelated"
