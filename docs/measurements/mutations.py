"""Planted errors, one at a time, against the tests that own the code.

`python -m docs.measurements.mutations [AREA ...]` works on a copy of the tree in a temporary folder. Every file of an
area gives its possible mutants (operators and signs exchanged, constants changed, arguments swapped, conditions
negated, calls left out, None returned), of which `--per-file` are drawn by their digests, the same at every call. A
mutant is killed if one of the quick tests that belong to its file fails or does not end. Results are kept in
mutations.json: what was killed is not run again while the line stands, what survived is run again when its tests
change. Survivors that change no result are listed with the reason in mutations_equivalent.json. Prints a score for
each file and the survivors.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from docs.measurements.mutants import Mutant, mutants

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTPUT = "output.txt"
RESULTS, EQUIVALENT = HERE / "mutations.json", HERE / "mutations_equivalent.json"

HEART: tuple[str, ...] = (
    "tests/passes/test_gaussian_roles.py",
    "tests/training/test_gaussian_training.py",
    "tests/training/distillation/test_gaussian_simulation.py",
    "tests/passes/test_gaussian_depth.py",
    "tests/passes/test_gaussian_students.py",
)
ROLES: tuple[str, ...] = (
    "tests/training/test_gaussian_training.py",
    "tests/training/distillation/test_gaussian_simulation.py",
    "tests/passes/test_gaussian_roles.py",
    "tests/training/test_figures.py",
    "tests/training/engines/test_optimiser.py",
    "tests/training/test_loop.py",
)
TRAINING, MODELS, PASSES = "flcompress/training", "flcompress/models", "flcompress/passes"
LORAS = "flcompress/loras"

EVERY_PASS = ("tests/passes/test_held_out.py", "tests/frontend/test_reference.py")
IMPORTANCE = tuple(f"tests/passes/test_{name}.py" for name in ("importance", "certainty"))
DEPTH = tuple(f"tests/passes/test_{name}.py" for name in ("gaussian_depth", "passes"))
JOINT = tuple(f"tests/passes/test_{name}.py" for name in ("joint_selection", "select"))
CONSISTENCY = ("tests/training/test_consistency.py",)
FEATURES = ("tests/passes/test_feature_distill.py",)
ATTENTION = ("tests/passes/test_temporal_attention.py",)
AUTOENCODER = ("tests/passes/test_train_autoencoder.py",)

PASS_TESTS: dict[str, tuple[str, ...]] = {
    "dmd": tuple(f"tests/passes/test_{name}.py" for name in ("gaussian_roles", "passes", "lora_roles")),
    "stochastic_depth": DEPTH,
    "importance": IMPORTANCE,
    "select": JOINT,
    "prune": ("tests/passes/test_certificates.py", "tests/passes/test_passes.py"),
    "pretrain": DEPTH,
    "consistency": (*CONSISTENCY, "tests/families/test_consistency.py"),
    "feature_distill": (*FEATURES, *ATTENTION),
    "temporal_attention": (*ATTENTION, "tests/passes/test_importance.py"),
    "train_autoencoder": AUTOENCODER,
    "interpolate": ("tests/passes/test_interpolate.py",),
}
METHOD_TESTS: dict[str, tuple[str, ...]] = {
    "stochastic_depth": DEPTH,
    "pretraining": DEPTH,
    "block_importance": IMPORTANCE,
    "skipped_loss": (*IMPORTANCE, *JOINT),
    "stratified_draws": IMPORTANCE,
    "joint_selection": JOINT,
    "consistency": CONSISTENCY,
    "feature_distill": FEATURES,
    "feature_discriminator": FEATURES,
    "temporal_attention": ATTENTION,
    "autoencoder": AUTOENCODER,
}

Owners = dict[str, tuple[str, ...]]

AREAS: dict[str, Owners] = {
    "diffusion": {"flcompress/diffusion": ("tests/diffusion",)},
    "passes": {
        f"{TRAINING}/distillation/roles.py": (
            *HEART,
            *(f"tests/passes/test_{n}.py" for n in ("leaning", "passes", "lora_roles")),
        ),
        **{f"{PASSES}/{name}.py": (*EVERY_PASS, *tests) for name, tests in PASS_TESTS.items()},
        **{f"{TRAINING}/methods/{name}.py": tests for name, tests in METHOD_TESTS.items()},
    },
    "roles": {f"{TRAINING}/{name}.py": ROLES for name in ("role", "watching/held_out")}
    | {f"{TRAINING}/objectives.py": (*ROLES, "tests/diffusion/test_experts.py", "tests/passes/test_gaussian_depth.py")}
    | {f"{TRAINING}/distillation/{name}.py": ROLES for name in ("critic_lag", "guided_teacher", "simulation")}
    | {f"{TRAINING}/distillation/discriminator.py": (*ROLES, "tests/training/distillation/test_discriminator.py")}
    | {f"{TRAINING}/distillation/samples.py": (*ROLES, "tests/training/watching/test_redraws.py")}
    | {
        f"{TRAINING}/engines/{name}.py": (*ROLES, "tests/training/engines/test_offload.py")
        for name in ("optimiser", "replicated")
    },
    "lora": {
        f"{TRAINING}/shared_base.py": ("tests/training/test_shared_base.py",),
        **{f"flcompress/loras/{name}.py": ("tests/loras/test_keys.py",) for name in ("keys", "names", "peft_settings")},
    },
    "sharding": {
        f"{MODELS}/shards.py": ("tests/models/test_shards.py",),
        "flcompress/draws.py": ("tests/test_draws.py",),
    },
    "families": {f"{MODELS}/families": ("tests/families/test_conversions.py", "tests/families/test_sampling.py")},
}


def sampled(file: Path, root: Path, count: int) -> list[Mutant]:
    """The mutants of a file that are run: those with the lowest digests, so that an edit elsewhere changes few."""
    every = list(mutants(file, root))
    return sorted(every, key=lambda one: hashlib.sha256(one.key.encode()).hexdigest())[:count]


def owned(areas: list[str]) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    """(area, file, tests) of each file of the areas."""
    for area in areas:
        for place, tests in AREAS[area].items():
            path = ROOT / place
            for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
                if file.name != "__init__.py":
                    yield area, file, tuple(one for one in tests if (ROOT / one).exists())


def digest(tests: tuple[str, ...], tree: Path) -> str:
    """Of the contents of test files, and of what they share."""
    found = hashlib.sha256((tree / "tests" / "fixtures" / "gaussian.py").read_bytes())
    for one in tests:
        path = tree / one
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            found.update(file.read_bytes())
    return found.hexdigest()[:12]


def run(tree: Path, tests: tuple[str, ...], limit: float, *, compile_files: bool = False) -> str:
    """ "survived", "killed" or "timeout": the tests in a child of this process, which has imported what takes long.

    What they print is in a file next to the tree, `OUTPUT`.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        quiet = os.open(tree.parent / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)  # of processes that tests start
        sys.dont_write_bytecode = not compile_files
        import pytest

        # Plugins were imported before pytest could rewrite their assertions.
        options = [
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            "--timeout=0",
            f"--basetemp={tree}-tests",
        ]
        os._exit(int(pytest.main([*options, *tests])))
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def save(key: str, row: dict[str, object]) -> None:
    """Add one result; another call may be adding its own."""
    with (Path(tempfile.gettempdir()) / "measure-mutations.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        results[key] = row
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")


def measure(tree: Path, areas: list[str], per_file: int) -> None:
    """Run what has no result yet, and print the score."""
    equivalent = json.loads(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.exists() else {}
    base: dict[tuple[str, ...], float] = {}
    totals: dict[str, list[int]] = {}
    for area, file, tests in owned(areas):
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        now, chosen = digest(tests, tree), sampled(file, ROOT, per_file)
        copied = tree / file.relative_to(ROOT)
        rows = {}
        for one in chosen:
            row = known.get(one.key)
            if one.key in equivalent:
                rows[one.key] = "equivalent"
                continue
            if row is None or (row["status"] == "survived" and row["tests"] != now):
                if tests not in base:
                    started = time.monotonic()
                    if run(tree, tests, 1200.0, compile_files=True) != "survived":
                        print((tree.parent / OUTPUT).read_text(encoding="utf-8")[-4000:])
                        raise SystemExit(f"{', '.join(tests)}: fail without any mutant")
                    base[tests] = time.monotonic() - started
                for stale in copied.parent.glob(f"__pycache__/{copied.stem}.*"):
                    stale.unlink()
                copied.write_text(one.make(), encoding="utf-8")
                status = run(tree, tests, 60.0 + 4.0 * base[tests])
                shutil.copy(file, copied)
                row = {"area": area, "status": status, "tests": now}
                save(one.key, row)
            rows[one.key] = row["status"]
        count = [sum(status in names for status in rows.values()) for names in (KILLED, ("survived",), ("equivalent",))]
        totals[area] = [one + other for one, other in zip(totals.get(area, [0, 0, 0]), count, strict=True)]
        print(f"{file.relative_to(ROOT)}: {count[0]} killed, {count[1]} survived, {count[2]} equivalent", flush=True)
        for key, status in rows.items():
            if status == "survived":
                print(f"    {key.partition(' | ')[2]}", flush=True)
    for area, (killed, survived, same) in totals.items():
        print(f"{area}: {killed} of {killed + survived} killed, {same} equivalent", flush=True)


KILLED = ("killed", "timeout")


def main() -> None:
    """Copy the tree and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", choices=[*AREAS, []], metavar="AREA", help=", ".join(AREAS))
    parser.add_argument("--per-file", type=int, default=12, help="mutants of each file")
    given = parser.parse_args()
    import diffusers.pipelines.wan.pipeline_wan  # what a child need not import
    import torch
    import transformers

    del diffusers, transformers
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"))
        measure(tree, given.areas or list(AREAS), given.per_file)


if __name__ == "__main__":
    main()
