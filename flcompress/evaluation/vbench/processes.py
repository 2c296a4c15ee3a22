"""The worker under another interpreter: what it says of itself, and its answers, one process a GPU."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from flcompress.errors import FlcompressError, RequestError, UnavailableError
from flcompress.evaluation.vbench.scores import DIMENSIONS

WORKER = Path(__file__).with_name("worker.py")
DESCRIBE_SECONDS = 900.0
"""How long the worker may take to import VBench and to hash its weights."""

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
_DROPPED = ("PYTHONPATH", "PYTHONHOME", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that are about this process: its modules, and its place among those of a launcher."""

CONTINUE = "what was judged before is kept, and the same command continues"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One dimension of one clip."""

    key: str
    dimension: str
    video: str
    image: str | None
    frame_rate: float

    def __str__(self) -> str:
        return f"{self.video}, {self.dimension}"


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """The Python of the judge's environment and its checkout, VBench's own or FastVideo's."""

    python: Path
    repo: Path

    @property
    def name(self) -> str:
        """Whose judge it is."""
        return "FastVideo" if self._fastvideo else "VBench"

    @property
    def vbench(self) -> Path:
        """The checkout of VBench, which is a submodule of FastVideo's."""
        return self.repo / "fastvideo" / "third_party" / "eval" / "vbench" if self._fastvideo else self.repo

    @property
    def dimensions(self) -> Sequence[str]:
        """What it judges: FastVideo's evaluation compares no clip with its first frame."""
        return tuple(name for name in DIMENSIONS if not (self._fastvideo and name.startswith("i2v_")))

    @property
    def _fastvideo(self) -> bool:
        return (self.repo / "fastvideo" / "eval").is_dir()

    def describe(self) -> dict[str, Any]:
        """Return name, commit, versions and weights of the judge.

        Raises:
            RequestError: the interpreter cannot be run.
            UnavailableError: VBench cannot be imported there, or weights are missing; the message names them.
        """
        command = self._command("--describe")
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=DESCRIBE_SECONDS, env=_environment())
        except OSError as error:
            raise RequestError(
                f"--vbench-python: {self.python} cannot be run ({error.strerror}); expected the Python of the "
                f"environment that {self.name} is installed in, see docs/evaluation.md"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(
                f"--vbench-python: {self.python} imports {self.name} for over {DESCRIBE_SECONDS:g} seconds; run "
                f"{' '.join(command)} to see why"
            ) from error
        described = _json(told.stdout.strip().rpartition("\n")[2])
        if told.returncode or described is None or "missing" not in described:
            last = _last_line(told.stderr) or f"exit status {told.returncode}"
            raise UnavailableError(f"--vbench-python: {self.python}: {last}; see docs/evaluation.md, VBench-I2V")
        faults, missing, folder = (described.pop(name) for name in ("faults", "missing", "folder"))
        if faults:
            raise UnavailableError(
                f"--vbench-python: {self.python} cannot import {self.name} ({' '.join(faults[0].split())}); install it "
                "as docs/evaluation.md says, VBench-I2V"
            )
        if missing:
            raise UnavailableError(
                f"{self.name}'s weights: {len(missing)} files are missing: {', '.join(missing)}; nothing is "
                f"downloaded: docs/evaluation.md says where each is from. {folder} names another folder"
            )
        return dict(described)

    def judge(
        self, jobs: Sequence[Job], devices: Sequence[str], folder: Path, beat: Callable[[], None]
    ) -> Iterator[tuple[str, float]]:
        """Yield (key, score) of jobs as they are judged, one process a device.

        Args:
            jobs: what to judge; jobs of a dimension follow each other, since its network is loaded once.
            devices: as torch names them.
            folder: for the lists of jobs and the workers' logs.
            beat: called at least every second.

        Raises:
            FlcompressError: after everything else is judged: a worker ended early or printed something else, or VBench
                refused a clip; the message names the clip.
        """
        folder.mkdir(parents=True, exist_ok=True)
        slices = [part for n in range(len(devices)) if (part := jobs[n :: len(devices)])]
        lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
        workers = [
            _Worker(self._command, part, device, folder / f"worker-{os.getpid()}-{n}", n, lines)
            for n, (part, device) in enumerate(zip(slices, devices, strict=False))
        ]
        faults: list[str] = []
        try:
            while any(not worker.ended for worker in workers):
                beat()
                try:
                    number, line = lines.get(timeout=1.0)
                except queue.Empty:
                    continue
                worker = workers[number]
                if worker.ended:
                    continue
                answer = worker.take(line, faults)
                if answer is not None:
                    yield answer
        finally:
            for worker in workers:
                worker.stop()
        if faults:
            more = f"; {len(faults) - 1} more clips or workers failed" if len(faults) > 1 else ""
            raise FlcompressError(f"{self.python}: {faults[0]}; {CONTINUE}{more}")

    def _command(self, *options: str) -> list[str]:
        return [str(self.python), str(WORKER), "--repo", str(self.repo.resolve()), *options]


class _Worker:
    """One process, and the jobs that it has not answered."""

    def __init__(
        self,
        command: Callable[..., list[str]],
        jobs: Sequence[Job],
        device: str,
        name: Path,
        number: int,
        lines: queue.Queue[tuple[int, str | None]],
    ) -> None:
        self._left, self._log, self.ended = list(jobs), name.with_suffix(".log"), False
        listed = name.with_suffix(".jsonl")
        listed.write_text("".join(json.dumps(asdict(job)) + "\n" for job in jobs), encoding="utf-8")
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command("--device", device, "--jobs", str(listed.resolve())),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                errors="backslashreplace",
                env=_environment(),
            )
        assert self._process.stdout is not None
        threading.Thread(target=_pass_on, args=(self._process.stdout, number, lines), daemon=True).start()

    def take(self, line: str | None, faults: list[str]) -> tuple[str, float] | None:
        """Return the answer in a line; None, and an entry of `faults`, where it is none. A line of None is the end."""
        if line is None:
            self.ended, status = True, self._process.wait()
            if self._left:
                why = _last_line(self._log.read_text(encoding="utf-8", errors="replace")) or "it printed no reason"
                faults.append(
                    f"the worker ended with exit status {status} at {self._left[0]} ({why}; its log: {self._log})"
                )
            return None
        answer, job = _json(line), self._left[0] if self._left else None
        value = answer.get("value") if answer is not None else None
        if answer is None or job is None or answer.get("key") != job.key or not ({"value", "error"} & answer.keys()):
            self.ended = True
            faults.append(f"the worker printed {line.strip()[:80]!r} at {job or 'its end'}, expected the clip's score")
            return None
        del self._left[0]
        if "error" in answer:
            faults.append(f"{job}: {' '.join(str(answer['error']).split())[:300]}")
            return None
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            faults.append(f"{job}: {value} given, expected a number")
            return None
        return job.key, float(value)

    def stop(self) -> None:
        """End the process if it still runs."""
        self.ended = True
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def _pass_on(stream: IO[str], number: int, lines: queue.Queue[tuple[int, str | None]]) -> None:
    with stream:
        for line in stream:
            lines.put((number, line))
    lines.put((number, None))


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _DROPPED} | _OFFLINE


def _json(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return " ".join(lines[-1].split())[:300] if lines else ""
