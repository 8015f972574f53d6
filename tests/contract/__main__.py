"""Try every kind of wrong input on the command line: `python -m tests.contract` (all), or `--sample 120`.

Prints a line for each input that breaks the contract, a count of the rest, and exits with 1 where one broke it.
"""

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}

from tests.contract.good_inputs import KINDS, OUT_COMMANDS, Kind, bad_outs, make_all
from tests.contract.mutations import Mutation, mutations_of
from tests.contract.trial import tried


@dataclass(frozen=True)
class Trial:
    """One command on one wrong input."""

    kind: str
    label: str
    argv: tuple[str, ...]
    source: Path | None = None
    """Folder that is copied, with `file` changed by `mutation`."""
    file: str = ""
    mutation: Mutation | None = None


def preloaded() -> None:
    """Import what commands import, so that a child starts in milliseconds."""
    import importlib
    import pkgutil

    import peft
    import torch
    import transformers

    import molehunt

    torch.set_num_threads(1)
    transformers.AutoModelForCausalLM, peft.PeftModel  # noqa: B018  # lazy names
    for module in pkgutil.walk_packages(molehunt.__path__, "molehunt."):
        if "vllm" not in module.name and "__main__" not in module.name:
            with contextlib.suppress(ModuleNotFoundError):  # of an extra that is not installed
                importlib.import_module(module.name)


def all_trials(good: Path, rng: random.Random, n_bytes: int) -> Iterator[tuple[int, Trial]]:
    """Every trial with the weight of its kind."""
    for kind in KINDS:
        source = good / kind.folder
        for file in _files(source):
            name = file.relative_to(source).as_posix()
            for i, mutation in enumerate(mutations_of(file, rng, n_bytes)):
                if kind.name == "traffic" and mutation.label == "file: a pipe":
                    continue  # a pipe is a stream: it is waited for
                for argv in _commands(kind, i):
                    yield kind.weight, Trial(kind.name, f"{name}: {mutation.label}", argv, source, name, mutation)
    for name, path in bad_outs(good):
        for argv in OUT_COMMANDS:
            yield 2, Trial("--out", name, (*argv, "--out", path))


def _files(source: Path) -> list[Path]:
    """The files of a folder; of those with the same name, such as the units of a run, the first two."""
    seen = Counter[str]()
    found: list[Path] = []
    for path in sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith(".")):
        seen[path.name] += 1
        if seen[path.name] <= 2:
            found.append(path)
    return found


def _commands(kind: Kind, i: int) -> tuple[tuple[str, ...], ...]:
    """The command that reads this input: they take turns."""
    return (kind.commands[i % len(kind.commands)],)


def judged(trial: Trial, good: Path, idle: float) -> tuple[int, list[str], str]:
    """Exit code, faults and what the child printed of one trial, in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=good.parent) as name:
        work = Path(name)
        changed = work / "x"
        out = None
        if trial.source is not None:
            shutil.copytree(trial.source, changed, copy_function=os.link)
            target = changed / trial.file
            raw = target.read_bytes()
            target.unlink()
            target.write_bytes(raw)
            assert trial.mutation is not None
            trial.mutation.apply(target)
        elif trial.argv[-1].startswith(str(good)):  # a place that a command may fill
            out = Path(trial.argv[-1])
            if os.path.isdir(out):
                shutil.copytree(out, changed, symlinks=True, copy_function=_copied)
                out = changed
            else:
                out = None
        (work / "work").mkdir()
        put = {"good": good, "x": changed, "work": work / "work", "file": changed / trial.file}
        argv = [_filled(word, put) for word in trial.argv]
        if out is not None:
            argv[-1] = str(out)
        done = tried(argv, work)
        said = "\n".join(part.strip()[-600:] for part in (done.out, done.err) if part.strip())
        for path in work.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        return done.code, done.faults(idle), said


def _copied(source: str, target: str) -> None:
    import stat

    if stat.S_ISFIFO(os.lstat(source).st_mode):
        os.mkfifo(target)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def _filled(word: str, put: dict[str, Path]) -> str:
    for name, path in put.items():
        word = word.replace(f"{{{name}}}", str(path))
    return word


def good_runs(good: Path) -> float:
    """Run every command on good inputs: each must end with 0 or 1. Returns the most memory in MB that one took."""
    idle = 0.0
    for kind in KINDS:
        first = next(path for path in sorted((good / kind.folder).iterdir()) if path.is_file())
        for argv in kind.commands:
            with tempfile.TemporaryDirectory(dir=good.parent) as name:
                work = Path(name)
                shutil.copytree(good / kind.folder, work / "x")
                (work / "work").mkdir()
                put = {"good": good, "x": work / "x", "work": work / "work", "file": work / "x" / first.name}
                done = tried([_filled(word, put) for word in argv], work)
                if done.code > 1 and kind.name not in {"traffic", "run folder", "published state", "grid"}:
                    raise SystemExit(f"a good input fails: {kind.name}: {argv}\n{done.code} {done.out} {done.err}")
                idle = max(idle, done.megabytes)
    return idle


def run_good(argv: list[str], folder: Path) -> None:
    done = tried(argv, folder)
    if done.code not in (0, 1):
        raise SystemExit(f"a good input cannot be made: {' '.join(argv)}\n{done.out}\n{done.err}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="how many inputs are tried; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bytes", type=int, default=60, help="how many byte mutations of each file")
    parser.add_argument("--only", help="kinds or labels that contain this text")
    parser.add_argument("--every", type=int, default=1, help="of all inputs, every n-th")
    options = parser.parse_args()
    preloaded()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="molehunt-contract-") as name:
        good = Path(name) / "good"
        good.mkdir()
        make_all(good, run_good)
        idle = good_runs(good) if options.sample is None else 3000.0
        rng = random.Random(options.seed)
        drawn = list(all_trials(good, rng, options.bytes))
        if options.only:
            drawn = [(w, one) for w, one in drawn if options.only in f"{one.kind} {one.label} {' '.join(one.argv)}"]
        trials = [one for _, one in drawn]
        if options.sample is not None and options.sample < len(trials):
            trials = sampled(drawn, options.sample, rng)
        elif options.every > 1:
            trials = trials[options.seed % options.every :: options.every]
        each = Counter(one.kind for _, one in drawn)
        print(
            f"{len(trials)} of {len(drawn)} inputs {dict(each)}; good ones made in {time.monotonic() - began:.0f} s",
            flush=True,
        )
        return report(trials, good, idle)


def sampled(drawn: list[tuple[int, Trial]], n: int, rng: random.Random) -> list[Trial]:
    """`n` trials: kinds by weight, and within a kind the files and the classes of mutation alike."""
    groups: dict[str, dict[str, list[Trial]]] = {}
    weights: dict[str, int] = {}
    for weight, one in drawn:
        where = f"{one.file} {one.label.partition(': ')[2].partition(':')[0]}"
        groups.setdefault(one.kind, {}).setdefault(where, []).append(one)
        weights[one.kind] = weight
    found: list[Trial] = []
    kinds = list(groups)
    for _ in range(n):
        (kind,) = rng.choices(kinds, [weights[k] for k in kinds])
        found.append(rng.choice(groups[kind][rng.choice(list(groups[kind]))]))
    return found


def report(trials: list[Trial], good: Path, idle: float) -> int:
    broken, codes, began = 0, Counter[int](), time.monotonic()
    for i, trial in enumerate(trials, 1):
        code, faults, said = judged(trial, good, idle)
        codes[code] += 1
        if faults:
            broken += 1
            words = " ".join(word for word in trial.argv if not word.startswith("{good}") or word == "{good}/x")
            print(f"BROKEN {trial.kind}: {trial.label} [{words[:100]}]: {'; '.join(faults)}", flush=True)
            print("    " + said.encode("ascii", "backslashreplace").decode()[-500:].replace("\n", "\n    "), flush=True)
        if i % 500 == 0:
            print(f"{i} tried, {broken} broken, {time.monotonic() - began:.0f} s, codes {dict(codes)}", flush=True)
    print(
        f"{len(trials)} tried, {broken} broken; exit codes {dict(sorted(codes.items()))}; {time.monotonic() - began:.0f} s"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
