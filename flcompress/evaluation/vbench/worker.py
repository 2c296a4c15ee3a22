"""Judge clips by VBench. A program of its own: the Python of the judge's environment runs it, without flcompress.

    python worker.py --repo CHECKOUT --describe
    python worker.py --repo CHECKOUT --device cuda:0 --jobs JOBS.jsonl

`--describe` prints one JSON object: {"name", "commit", "versions", "weights": {file: SHA-256}, "missing": [files],
"folder": the variable that names where they are looked for, "faults": [what cannot be imported]}. Else a line of the
jobs' file is {"key", "dimension", "video", "image", "frame_rate"}, and each is answered, in their order, by a line
{"key", "value"} or {"key", "error"} on standard output. Nothing is downloaded. Python 3.9 or newer.

A checkout with a folder `fastvideo/eval` is FastVideo's, whose evaluation has VBench's dimensions on current libraries,
without those that compare with the first frame. Every other checkout is taken for VBench's own.

A checkout that holds `fake-vbench.json` has its clips judged by a hash of their bytes, so that all around the judge can
be tried where VBench is not installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

FAKE = "fake-vbench.json"

PACKAGES = (
    "vbench",
    "fastvideo",
    "torch",
    "torchvision",
    "numpy",
    "opencv-python",
    "decord",
    "av",
    "timm",
    "openai-clip",
    "pyiqa",
    "dreamsim",
)
"""Packages whose versions are told: scores depend on them."""

DINO = ("dino_model/facebookresearch_dino_main/hubconf.py", "dino_model/dino_vitbase16_pretrain.pth")
LORA = "dreamsim_model/ensemble_lora"
FILES = {
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "subject_consistency": DINO,
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "i2v_subject": DINO,
    "i2v_background": (
        *DINO,
        "dreamsim_model/dino_vitb16_pretrain.pth",
        "dreamsim_model/clip_vitb16_pretrain.pth.tar",
        "dreamsim_model/open_clip_vitb16_pretrain.pth.tar",
        f"{LORA}/adapter_config.json",
    ),
}
"""Dimension -> the files that it reads, below VBENCH_CACHE_DIR."""

Job = dict[str, Any]
Score = Callable[[Job], float]


def cache_folder() -> Path:
    """Return where VBench keeps its weights."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


class Fake:
    """Judges by hashes; for trials of everything but the judge."""

    def describe(self) -> dict[str, Any]:
        """Return what `--describe` prints."""
        return {
            "name": "fake",
            "commit": None,
            "versions": {},
            "weights": {},
            "missing": [],
            "folder": "VBENCH_CACHE_DIR",
            "faults": [],
        }

    def dimension(self, name: str) -> Score:
        """Return job -> score: the dimension's name and the clip's bytes decide it."""

        def score(job: Job) -> float:
            digest = hashlib.sha256(name.encode() + Path(job["video"]).read_bytes()).digest()
            share = int.from_bytes(digest[:8], "big") / 2**64
            return float(share < 0.5) if name == "dynamic_degree" else share

        return score


class VBench:
    """VBench's own code, one dimension in memory at a time."""

    def __init__(self, repo: Path, device: str) -> None:
        """Nothing is imported yet.

        Args:
            repo: the checkout, which is the working folder and on the path of modules.
            device: as torch names it.
        """
        self._repo, self._device = repo, device

    def describe(self) -> dict[str, Any]:
        """Return what `--describe` prints."""
        folder, faults = cache_folder(), [fault for name in FILES if (fault := self._fault(name))]
        wanted = sorted({path for paths in FILES.values() for path in paths})
        lora = [f"{LORA}/{file.name}" for file in sorted((folder / LORA).glob("adapter_model.*"))]  # safetensors or bin
        wanted += lora or [f"{LORA}/adapter_model.safetensors"]
        return description("vbench", self._repo, "VBENCH_CACHE_DIR", {path: folder / path for path in wanted}, faults)

    def _fault(self, name: str) -> str:
        """Return why a dimension's code cannot be imported; "" if it can."""
        try:
            self._module(name)
        except Exception as error:  # noqa: BLE001 (whatever another environment's code raises)
            return f"{name}: {type(error).__name__}: {error}"
        return ""

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"vbench2_beta_i2v.{name}" if name.startswith("i2v_") else f"vbench.{name}")

    def dimension(self, name: str) -> Score:
        """Load a dimension's network; return job -> score, by VBench's own functions and settings."""
        import torch

        # VBench's script passes a device and not its name: by the name it would scale clips down on small cards.
        module, device = self._module(name), torch.device(self._device)
        files = [str(cache_folder() / path) for path in FILES[name]]
        if name == "motion_smoothness":
            config = Path(module.__file__).parent / "third_party" / "amt" / "cfgs" / "AMT-S.yaml"
            smoothness = module.MotionSmoothness(str(config), files[0], device)
            return lambda job: smoothness.motion_score(job["video"])
        if name == "dynamic_degree":
            settings = {"model": files[0], "small": False, "mixed_precision": False, "alternate_corr": False}
            motion = module.DynamicDegree(module.edict(settings), device)
            return lambda job: motion.infer(job["video"])
        if name == "aesthetic_quality":
            vision, _ = module.clip.load(files[0], device=device)
            head = module.get_aesthetic_model(str(Path(files[1]).parent)).to(device)
            return lambda job: score_of(module.laion_aesthetic(head, vision, [job["video"]], device))
        if name == "imaging_quality":
            network = module.MUSIQ(pretrained_model_path=files[0]).to(device)
            network.training = False
            way = {"imaging_quality_preprocessing_mode": "longer"}
            return lambda job: score_of(module.technical_quality(network, [job["video"]], device, **way)) / 100.0
        if name == "background_consistency":
            vision, prepare = module.clip.load(files[0], device=device)
            return lambda job: score_of(module.background_consistency(vision, prepare, [job["video"]], device, False))
        dino = self._dino(files)
        if name == "subject_consistency":
            dino = dino.to(device)
            return lambda job: score_of(module.subject_consistency(dino, [job["video"]], device, False))
        if name == "i2v_subject":
            dino = dino.to(device)
            return lambda job: score_of(module.i2v_subject(dino, [(job["image"], job["video"])], device))
        loader = torch.hub.load
        try:
            torch.hub.load = lambda *given, **options: dino  # DreamSim would download it
            folder = str(cache_folder() / "dreamsim_model")
            network, _ = module.dreamsim(pretrained=True, device=str(device), cache_dir=folder)
        finally:
            torch.hub.load = loader
        return lambda job: score_of(module.i2v_background(network, [(job["image"], job["video"])], device))

    def _dino(self, files: list[str]) -> Any:
        """Return DINO ViT-B/16 from its checkout and its file; VBench's own way downloads the file again."""
        import torch

        folder, way = str(Path(files[0]).parent), {"source": "local", "pretrained": False}
        network = torch.hub.load(folder, "dino_vitb16", **way)  # type: ignore[no-untyped-call]
        network.load_state_dict(torch.load(files[1], map_location="cpu"))
        return network.eval()


class FastVideo:
    """FastVideo's evaluation, one dimension in memory at a time."""

    DIMENSIONS = (
        "motion_smoothness",
        "dynamic_degree",
        "aesthetic_quality",
        "imaging_quality",
        "subject_consistency",
        "background_consistency",
    )
    RAFT = ("sbalani/raft-things", "raft-things.pth")

    def __init__(self, repo: Path, device: str) -> None:
        """Nothing is imported yet.

        Args:
            repo: the checkout, which is on the path of modules, with its submodules.
            device: as torch names it.
        """
        self._repo, self._device = repo, device

    def describe(self) -> dict[str, Any]:
        """Return what `--describe` prints."""
        faults = [fault for name in self.DIMENSIONS if (fault := self._fault(name))]
        return description("fastvideo", self._repo, "FASTVIDEO_EVAL_CACHE", {} if faults else self._files(), faults)

    def _fault(self, name: str) -> str:
        """Return why a dimension cannot be had; "" if it can. FastVideo itself leaves out silently what it lacks."""
        try:
            self._module(f".metrics.vbench.{name}.metric")
            self._module("").get_metric(f"vbench.{name}")
            importlib.import_module("vbench.utils")  # what it imports at first use only
        except Exception as error:  # noqa: BLE001 (whatever another environment's code raises)
            return f"{name}: {type(error).__name__}: {error}"
        return ""

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"fastvideo.eval{name}")

    def _files(self) -> dict[str, Path | None]:
        """Return where FastVideo looks for its weights; None for one that is not in Hugging Face's cache."""
        import huggingface_hub
        import torch

        cache, hub = Path(self._module("").get_cache_dir()), Path(torch.hub.get_dir())
        raft = huggingface_hub.try_to_load_from_cache(*self.RAFT)
        return {
            "amt-s.pth": cache / "models" / "amt-s.pth",
            "sa_0_4_vit_l_14_linear.pth": cache / "models" / "sa_0_4_vit_l_14_linear.pth",
            "ViT-L-14.pt": cache / "clip" / "ViT-L-14.pt",
            "ViT-B-32.pt": cache / "clip" / "ViT-B-32.pt",
            "musiq_spaq_ckpt-358bb6af.pth": hub / "pyiqa" / "musiq_spaq_ckpt-358bb6af.pth",
            "facebookresearch_dino_main/hubconf.py": hub / "facebookresearch_dino_main" / "hubconf.py",
            "dino_vitbase16_pretrain.pth": hub / "checkpoints" / "dino_vitbase16_pretrain.pth",
            f"{self.RAFT[1]} of huggingface.co/{self.RAFT[0]}": Path(raft) if isinstance(raft, str) else None,
        }

    def dimension(self, name: str) -> Score:
        """Load a dimension's network; return job -> score, by FastVideo's own functions and settings."""
        load_video = self._module(".io.video").load_video
        metric = self._module("").get_metric(f"vbench.{name}").to(self._device)
        metric.setup()

        def score(job: Job) -> float:
            result = metric.compute({"video": load_video(job["video"]), "fps": job["frame_rate"]})
            if result.score is None:
                raise ValueError(result.details.get("skipped", "no score"))
            return float(result.score)

        return score


def description(
    name: str, repo: Path, variable: str, files: dict[str, Path | None], faults: list[str]
) -> dict[str, Any]:
    """Return what `--describe` prints of a judge.

    Args:
        name: the judge's.
        repo: its checkout.
        variable: of the environment, which names the folder of its weights.
        files: weight -> where it is looked for; None where there is no such place yet.
        faults: what cannot be imported.
    """
    missing = [label if path is None else str(path) for label, path in files.items() if not (path and path.is_file())]
    whole = not (missing or faults)
    return {
        "name": name,
        "commit": commit_of(repo),
        "versions": {package: version for package in PACKAGES if (version := version_of(package))},
        "weights": {label: sha256(path) for label, path in files.items() if path} if whole else {},
        "missing": missing,
        "folder": variable,
        "faults": faults,
    }


def score_of(result: Any) -> float:
    """Return the score of the only video in a dimension's result."""
    return float(result[1][0]["video_results"])


def version_of(package: str) -> str:
    """Return a package's version; "" if it is not installed as one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit_of(repo: Path) -> str | None:
    """Return the commit of a checkout; None where git cannot say."""
    command = ["git", "-C", str(repo), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 24), b""):
            digest.update(block)
    return digest.hexdigest()


def judge(judging: Any, jobs: Iterable[Job], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer every job; a clip that VBench refuses is answered by its error, and the next one is judged."""
    loaded, score = "", None
    for job in jobs:
        if job["dimension"] != loaded:
            loaded, score = job["dimension"], None  # the one before leaves memory first
            score = judging.dimension(loaded)
        try:
            assert score is not None
            answer({"key": job["key"], "value": float(score(job))})
        except Exception as error:  # noqa: BLE001 (whatever another environment's code raises)
            answer({"key": job["key"], "error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Describe the judge, or judge the jobs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repo", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs")
    parser.add_argument("--describe", action="store_true")
    given = parser.parse_args()
    # What VBench prints goes to standard error; standard output is for answers alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    repo = Path(given.repo).resolve()
    lines = Path(given.jobs).read_text(encoding="utf-8").splitlines() if given.jobs else []
    os.chdir(repo)  # VBench's images are relative to it
    sys.path.insert(0, str(repo))
    named = FastVideo if (repo / "fastvideo" / "eval").is_dir() else VBench
    judging = Fake() if (repo / FAKE).is_file() else named(repo, given.device)
    if given.describe:
        answer(judging.describe())
    else:
        judge(judging, map(json.loads, lines), answer)


if __name__ == "__main__":
    main()
