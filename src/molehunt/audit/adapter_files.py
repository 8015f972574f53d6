"""What `files` says of an adapter: of which kind it is, which base it names, and whether it loads onto this one."""

from molehunt.checkpoint.adapter_folder import adapter_notes
from molehunt.checkpoint.difference import FolderDifference, Severity
from molehunt.checkpoint.loader_traps import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from molehunt.checkpoint.reader import Checkpoint
from molehunt.checkpoint.skeleton import skeleton
from molehunt.errors import InvalidInput, NotTestable


def adapter_differences(base: Checkpoint, adapter: Checkpoint) -> list[FolderDifference]:
    """Rows for an adapter folder. Of plain LoRA, that PEFT would load all of it onto this base is checked without weights.

    An adapter that loads nothing is a finding: whoever tests it tests the base.
    """
    rows = adapter_notes(base.path, adapter.adapter)
    if adapter.adapter.reading != "factors":
        return rows
    from molehunt.model.adapter_factors import lora_change  # takes seconds to import

    severity: Severity
    try:
        change = lora_change(skeleton(base.path), adapter.path)
    except (InvalidInput, NotTestable) as error:
        severity = "finding" if isinstance(error, InvalidInput) else "note"
        file, key, why = ADAPTER_WEIGHTS, "does not load", str(error).replace("\n", " ")
    else:
        n = 0 if change is None else len(change.factors)
        severity, file, key = "note", ADAPTER_CONFIG, "target_modules"
        why = f"LoRA on {n} matrices of this base" if change is not None else "LoRA on more than plain matrices"
    rows.append(FolderDifference(file=file, key=key, base="", tuned="", severity=severity, why=why))
    return rows
