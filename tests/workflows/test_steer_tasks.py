"""Tasks of lm-evaluation-harness: how the result reads, and what is refused before a task runs."""

import json
import sys
from pathlib import Path

import pytest
import torch

import molehunt as mh
from molehunt.errors import UsageError
from molehunt.measure.equivalence import paired_equivalence
from molehunt.steer.capability_lm_eval import Capability
from molehunt.steer.vector import VectorFacts
from molehunt.workflows.result import WorkflowResult
from molehunt.workflows.steer_tasks import TaskCapabilityResult, task_capability
from tiny_models import D_MODEL, tiny_model, tiny_tokenizer


def measured(metric: str, plain: float, steered: float, *, judged: bool) -> Capability:
    paired = paired_equivalence([True, False] * 5, [True] * 10) if judged else None
    return Capability(
        task="<b>arc</b>", metric=metric, rows=10, plain=plain, steered=steered, stderr=None, paired=paired
    )


def test_the_result_reads_as_text_json_and_html(tmp_path: Path) -> None:
    result = TaskCapabilityResult(
        tasks=(measured("acc,none", 1.0, 0.5, judged=True), measured("perplexity,none", 20.0, 24.5, judged=False))
    )
    assert isinstance(result, WorkflowResult)
    first, second = result.summary().splitlines()[1:]
    assert "1.000" in first and "0.500" in first and "[" in first  # judged rows come with an interval
    assert "+4.500" in second and "[" not in second
    assert json.loads(result.save(tmp_path).read_text()) == json.loads(json.dumps(result.to_dict()))
    assert "<b>arc" not in result._repr_html_() and "&lt;b&gt;arc" in result._repr_html_()


def test_without_lm_eval_the_extra_is_named_and_a_foreign_vector_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = mh.ModelPair(tiny_model("llama"), tiny_model("llama", 1), tiny_tokenizer())
    facts = VectorFacts(method="by hand", n_layers=pair.n_layers, d_model=D_MODEL)
    vector = mh.SteeringVector({0: torch.ones(D_MODEL)}, facts)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="amplifies the behaviour"):
        task_capability(pair, vector=vector, tasks=["arc_easy"], operator="ablate", strength=-1)
    with pytest.raises(UsageError, match=r"pip install .*\[exports\]"):
        task_capability(pair, vector=vector, tasks=["arc_easy"])
    other = mh.SteeringVector(
        {0: torch.ones(D_MODEL + 1)}, VectorFacts(method="by hand", n_layers=pair.n_layers, d_model=D_MODEL + 1)
    )
    with pytest.raises(UsageError):
        task_capability(pair, vector=other, tasks=["arc_easy"])
