"""The watch inside vLLM, as a worker extension. EXPERIMENTAL: it has run on vLLM's CPU backend, and never on a GPU.

    llm = LLM(TUNED, enforce_eager=True, enable_prefix_caching=False, async_scheduling=False,
              worker_extension_cls="molehunt.serve.vllm_plugin.WatchExtension")
    llm.collective_rpc("molehunt_watch", args=(DIRECTIONS, STATE, 0.01))
    llm.generate(…)
    (verdicts,) = llm.collective_rpc("molehunt_verdicts")

DIRECTIONS is written by `write_directions`, STATE by `molehunt serve` or `molehunt watch`. It only judges: nothing is
blocked or steered, and no alert is stored. A token that was not scored makes its request `unmonitored`.

What was read of vLLM's source (0.32 and 0.33) and what was run stands in docs/guides/serve.md. Where vLLM's insides are not as
they were there, this raises, or leaves requests `unmonitored`. Nothing imports vLLM: it calls this.

Source: vLLM documentation, "Plugin System" and `parallel_config.worker_extension_cls`.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import CannotTap, InvalidInput, UsageError, printable
from molehunt.run.whole import replace_whole
from molehunt.serve.packed import Chunk, PackedWatch, packed_columns
from molehunt.site import Site
from molehunt.watch.bank import Bank
from molehunt.watch.state import WatchState
from molehunt.watch.strata import prompt_features

REQUIRED: tuple[tuple[str, object, str], ...] = (
    ("model_config.enforce_eager", True, "--enforce-eager: Python, and so a hook, does not run when a graph is replayed"),
    ("cache_config.enable_prefix_caching", False, "--no-enable-prefix-caching: what is cached is not computed again"),
    ("scheduler_config.async_scheduling", False, "--no-async-scheduling: it feeds a token behind the answer's end"),
    ("parallel_config.tensor_parallel_size", 1, "--tensor-parallel-size 1: each worker would see a part of a matrix"),
    ("parallel_config.pipeline_parallel_size", 1, "--pipeline-parallel-size 1: each worker would see a part of the blocks"),
    ("speculative_config", None, "no --speculative-config: it feeds tokens that are taken back"),
    ("lora_config", None, "no --enable-lora: merge the adapter, each request could run another model"),
)  # fmt: skip
"""Settings without which tokens would be missed or compared with the wrong model."""
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")

log = logging.getLogger(__name__)


def write_directions(base: str, tuned: str, path: Path | str) -> None:
    """Write the directions of a difference into a file, where vLLM's processes can read them.

    They are computed anew, as `molehunt serve` does at its start: do this with the installation that calibrated the
    state, or the state will refuse them as another's.

    Raises:
        UsageError, InvalidInput: as `Checkpoint.open`.
        NotTestable: nothing changed that could be watched.
    """
    before, after = (Checkpoint.open(local_folder(folder)) for folder in (base, tuned))
    found = compare_weights(before, after)
    bank = Bank.of((row.directions for row in found.matrices if row.directions is not None), before.model_type)
    save_directions(bank, path)


def save_directions(bank: Bank, path: Path | str) -> None:
    """Write the directions of a bank. Law: `read_directions(path).sha256() == bank.sha256()`."""
    header = {
        "write": [[str(site), *names] for site, names in bank.write_names.items()],
        "read": [[module, *names] for module, names in bank.read_names.items()],
    }
    tensors = {f"write {site}": rows for site, rows in bank.write.items()}
    tensors |= {f"read {module}": rows for module, rows in bank.read.items()}
    replace_whole(Path(path), lambda partial: save_file(tensors, partial, {"molehunt_directions": json.dumps(header)}))


def read_directions(path: Path | str) -> Bank:
    """Read what `save_directions` wrote. Raises InvalidInput for anything else."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["molehunt_directions"])
            write = {Site.parse(site): (file.get_tensor(f"write {site}"), names) for site, *names in header["write"]}
            read = {module: (file.get_tensor(f"read {module}"), names) for module, *names in header["read"]}
        wrong = [rows.shape for rows, names in (*write.values(), *read.values()) if rows.shape[:-1] != (len(names),)]
        if wrong or not read:
            raise ValueError(f"directions of shapes {wrong}")
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise InvalidInput(
            f"{printable(Path(path).name)} holds no directions: {printable(str(error))}.\nWrite it with write_directions."
        ) from None
    return Bank(
        write={site: rows for site, (rows, _) in write.items()},
        read={module: rows for module, (rows, _) in read.items()},
        write_names={site: tuple(names) for site, (_, names) in write.items()},
        read_names={module: tuple(names) for module, (_, names) in read.items()},
    )


class WatchExtension:
    """Calls that vLLM adds to its worker, for `collective_rpc`; `self` is the worker."""

    vllm_config: Any
    model_runner: Any

    def molehunt_watch(self, directions: str, state: str, fpr: float) -> dict[str, Any]:
        """Score everything from now on. Requests that run already stay `unmonitored`.

        Args:
            directions: file of `write_directions`.
            state: `state.safetensors` in the folder of a calibrated watch or server.
            fpr: false-alarm rate that it was calibrated for.

        Returns:
            How many directions are watched, and the threshold.

        Raises:
            UsageError: vLLM runs with settings under which tokens would be missed; or the state is of another model,
                other directions or another rate; or it is watched already.
            InvalidInput: one of the files is broken.
            NotTestable, CannotTap: as `packed_columns`, or vLLM is not made as this was written for.
        """
        if "molehunt" in vars(self):
            raise UsageError("this worker is watched already")
        refuse_unsafe(self.vllm_config)
        bank = read_directions(directions)
        served = Checkpoint.open(local_folder(self.vllm_config.model_config.model))
        identity = {
            "tuned model": served.content_hash(),
            "set of directions": bank.sha256(),
            "false-alarm rate": f"{fpr:g}",
        }
        self.molehunt = RunnerWatch(self.model_runner, bank, WatchState.load(Path(state), identity), fpr=fpr)
        return {"directions": len(bank.names), "threshold": self.molehunt.threshold}

    def molehunt_verdicts(self) -> list[dict[str, Any]]:
        """Verdicts on every request that has ended since the last call, and on those that run, so far.

        A request's name is vLLM's internal one: the client's id, a hyphen and eight hexadecimal digits.
        """
        return [one.to_dict() for one in self._molehunt().watch.verdicts()]

    def molehunt_stop(self) -> None:
        """Take every hook away; what was not collected is lost."""
        self._molehunt().close()
        del self.molehunt

    def _molehunt(self) -> "RunnerWatch":
        if "molehunt" not in vars(self):
            raise UsageError("this worker is not watched: call molehunt_watch first")
        return self.molehunt


class RunnerWatch:
    """Follows every step of one model runner of vLLM: what was fed in which order, and what it scored."""

    def __init__(self, runner: Any, bank: Bank, state: WatchState, *, fpr: float) -> None:
        """Raises as `packed_columns`; CannotTap where the runner has no model, embedding or `execute_model`."""
        model: nn.Module = attribute_of(runner, "get_model")()
        self.threshold = state.monitor.threshold
        self.watch = PackedWatch(
            bank,
            state.monitor,
            fpr=fpr,
            features=features_of(model),
            device=next(model.parameters()).device,
        )
        self._runner = runner
        self._run: Callable[..., Any] = attribute_of(runner, "execute_model")
        self._given: Mapping[str, Any] = {}
        """Keyword arguments of the model in this step."""
        self._warned = False
        with ExitStack() as stack:
            self._columns = stack.enter_context(packed_columns(model, bank))
            stack.callback(model.register_forward_pre_hook(self._note, with_kwargs=True).remove)
            runner.execute_model = self._execute
            stack.callback(delattr, runner, "execute_model")
            self._hooks = stack.pop_all()

    def close(self) -> None:
        self._hooks.close()

    def _note(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._given = kwargs

    def _execute(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        """A step as vLLM runs it, and what it scored. Nothing is kept of a step that fails."""
        self._columns.clear()
        self._given = {}
        returned = self._run(scheduled, *args, **kwargs)
        if not kwargs.get("dummy_run"):  # for memory profiling: of no request
            self._follow(scheduled)
        return returned

    @torch.inference_mode()
    def _follow(self, scheduled: Any) -> None:
        self.watch.end(attribute_of(scheduled, "finished_req_ids"))
        prompts = {
            attribute_of(new, "req_id"): attribute_of(new, "prompt_token_ids")
            for new in attribute_of(scheduled, "scheduled_new_reqs")
        }
        for request, prompt in prompts.items():
            self.watch.begin(request, prompt)
        if not attribute_of(scheduled, "num_scheduled_tokens"):
            return
        chunks = packed_order(self._runner, scheduled)
        columns = self._columns.take(sum(chunk.tokens for chunk in chunks))
        if columns is None or not self._in_order(chunks, prompts):
            if not self._warned:
                log.warning(
                    "a step's tokens could not be assigned to requests: they are unmonitored; further steps are not reported"
                )
            self._warned, columns = True, None
        self.watch.step(chunks, columns)
        self._given = {}

    def _in_order(self, chunks: Sequence[Chunk], prompts: Mapping[str, Sequence[int] | None]) -> bool:
        """Whether the model was given these chunks: all positions, and the tokens of prompts that have just come.

        The order of the chunks was read from vLLM's insides, and this holds it to what went into the model.
        """
        ids, positions = self._given.get("input_ids"), self._given.get("positions")
        if not (isinstance(ids, Tensor) and isinstance(positions, Tensor) and ids.ndim == positions.ndim == 1):
            return False
        fed = list(zip(positions.tolist(), ids.tolist(), strict=True))
        at = 0
        for chunk in chunks:
            rows = fed[at : at + chunk.tokens]
            if [position for position, _ in rows] != list(range(chunk.start, chunk.start + chunk.tokens)):
                return False
            prompt = (prompts.get(chunk.request) or ())[chunk.start : chunk.start + chunk.tokens]
            if any(token != wanted for (_, token), wanted in zip(rows, prompt, strict=False)):
                return False
            at += chunk.tokens
        return True


def refuse_unsafe(config: Any) -> None:
    """Raises UsageError naming the settings of a vLLM config that `REQUIRED` forbids; CannotTap where one is unknown."""
    wrong: list[str] = []
    for path, wanted, how in REQUIRED:
        value = config
        for name in path.split("."):
            value = attribute_of(value, name)
        if value != wanted:
            wrong.append(how)
    if wrong:
        raise UsageError("vLLM runs in a way that cannot be watched. Start it with\n" + "\n".join(wrong))


def packed_order(runner: Any, scheduled: Any) -> list[Chunk]:
    """The requests of the step that just ran, in the order of their tokens.

    Read from vLLM's source and not from its documentation: runner V1 keeps the order in `input_batch`, and V2 in the
    `input_batch` of its `execute_model_state`, from the forward pass until the tokens are sampled. V1 was run on a CPU,
    V2 was not run. `RunnerWatch` holds the order to what the model was given; between requests that are decoding at the
    same position it has to be believed.

    Raises:
        CannotTap: it is not there.
    """
    batch = getattr(getattr(runner, "execute_model_state", None), "input_batch", None)
    order: Sequence[str] = attribute_of(attribute_of(runner, "input_batch") if batch is None else batch, "req_ids")
    counts: Mapping[str, int] = attribute_of(scheduled, "num_scheduled_tokens")
    cached = attribute_of(scheduled, "scheduled_cached_reqs")
    starts: dict[str, int] = dict(
        zip(attribute_of(cached, "req_ids"), attribute_of(cached, "num_computed_tokens"), strict=True)
    )
    starts |= {
        attribute_of(new, "req_id"): attribute_of(new, "num_computed_tokens")
        for new in attribute_of(scheduled, "scheduled_new_reqs")
    }
    if sorted(order) != sorted(counts) or not counts.keys() <= starts.keys():
        raise CannotTap(
            f"vLLM scheduled {len(counts)} requests and packed {len(order)} others: its insides are not those that "
            "Molehunt knows."
        )
    return [Chunk(request=name, start=int(starts[name]), tokens=int(counts[name])) for name in order]


def features_of(model: nn.Module) -> Callable[[Sequence[int]], Float[Tensor, "1 features"]]:
    """`prompt_features` of one prompt, by the model's own input embedding. Raises CannotTap unless it has exactly one."""
    found = [m for name, m in model.named_modules() if name.rpartition(".")[2] in EMBEDDINGS and hasattr(m, "weight")]
    if len(found) != 1:
        raise CannotTap(
            f"{type(model).__name__} has {len(found)} input embeddings by a name that Molehunt knows "
            f"({', '.join(EMBEDDINGS)})."
        )
    embedding = _Embedding(found[0])
    return lambda prompt: prompt_features(embedding, [prompt])


class _Embedding(nn.Module):
    """An input embedding where transformers' models have theirs; vLLM's models have no such method."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def attribute_of(thing: Any, name: str) -> Any:
    """An attribute of one of vLLM's objects. Raises CannotTap where it has none: nothing is guessed."""
    try:
        return getattr(thing, name)
    except AttributeError:
        raise CannotTap(
            f"vLLM's {type(thing).__name__} has no {name}: this version is not made as Molehunt knows it "
            "(0.32 and 0.33).\nServe with `molehunt serve` instead."
        ) from None
