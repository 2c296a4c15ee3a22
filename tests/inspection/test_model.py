"""Models inspected from their configuration alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import WanTransformer3DModel

from flcompress.cli import main
from flcompress.errors import RequestError
from flcompress.inspection.drawing import draw_inspection
from flcompress.inspection.model import inspect_model
from flcompress.models.inputs import example_inputs
from flcompress.tracing.counting import count_flops

WAN = {
    "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "attention_head_dim": 128,
    "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 13824, "freq_dim": 256, "image_dim": None, "in_channels": 16,
    "num_attention_heads": 40, "num_layers": 40, "out_channels": 16, "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 4096,
}  # fmt: skip
COG = {
    "_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 2,
    "use_rotary_positional_embeddings": True,
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "Wan 2.2 TI2V": (WAN | {"in_channels": 48, "out_channels": 48, "num_layers": 2}, [31, 44, 80]),
    "Wan 2.1 I2V": (
        WAN | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "num_layers": 2},
        [21, 60, 104],
    ),
    "HunyuanVideo": (
        {
            "_class_name": "HunyuanVideoTransformer3DModel", "num_attention_heads": 24, "attention_head_dim": 128,
            "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2, "guidance_embeds": True,
        },
        [33, 90, 160],
    ),
    "CogVideoX": (COG, [13, 60, 90]),
    "CogVideoX 1.5": (COG | {"patch_size_t": 2, "sample_height": 300, "sample_width": 300}, [14, 60, 90]),
    "CogVideoX I2V": (COG | {"in_channels": 32, "use_learned_positional_embeddings": True}, [13, 60, 90]),
    "LTX": (
        {
            "_class_name": "LTXVideoTransformer3DModel", "num_attention_heads": 32, "attention_head_dim": 64,
            "num_layers": 2,
        },
        [21, 16, 22],
    ),
    "Mochi": (
        {
            "_class_name": "MochiTransformer3DModel", "num_attention_heads": 24, "attention_head_dim": 128,
            "num_layers": 2,
        },
        [4, 60, 106],
    ),
    "Flux": (
        {
            "_class_name": "FluxTransformer2DModel", "num_attention_heads": 24, "attention_head_dim": 128,
            "num_layers": 2, "num_single_layers": 2,
        },
        [1, 128, 128],
    ),
    "SD3": (
        {"_class_name": "SD3Transformer2DModel", "num_attention_heads": 18, "attention_head_dim": 64, "num_layers": 3},
        [1, 128, 128],
    ),
    "QwenImage": (
        {
            "_class_name": "QwenImageTransformer2DModel", "num_attention_heads": 24, "attention_head_dim": 128,
            "num_layers": 2,
        },
        [1, 128, 128],
    ),
}  # fmt: skip


def cli(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def wan_flops(config: dict[str, Any], n: int, text: int) -> int:
    """Of one Wan block on n tokens: two floating-point operations for each multiplication of its matrix products."""
    d, f = int(config["num_attention_heads"] * config["attention_head_dim"]), int(config["ffn_dim"])
    own = 4 * n * d * d + 2 * n * n * d  # q, k, v, output; scores and their use
    cross = 2 * n * d * d + 2 * text * d * d + 2 * n * text * d
    return 2 * (own + cross + 2 * n * d * f)


@pytest.mark.e2e
def test_wan_14b_in_little_memory(tmp_path: Path) -> None:
    code = (
        "import re, sys; from flcompress.cli import main; main(sys.argv[1:], standalone_mode=False); "
        # Not `ru_maxrss`, which a command inherits from the process that started it.
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(written(tmp_path, WAN)), "--json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    text, _, peak = done.stdout.rstrip().rpartition("\n")
    found = json.loads(text)
    assert found["parameters"] == 14_288_491_584
    assert found["latents"] == [21, 60, 104]
    assert [block["path"] for block in found["blocks"]] == [f"blocks.{index}" for index in range(40)]
    assert {block["flops"] for block in found["blocks"]} == {wan_flops(WAN, 21 * 30 * 52, 512)}
    assert found["flops"] > sum(block["flops"] for block in found["blocks"])
    assert int(peak) < 2_000_000  # kilobytes


def test_flops_follow_the_size_of_the_clip(tmp_path: Path) -> None:
    folder = written(tmp_path, WAN | {"num_layers": 2})
    found = inspect_model(str(folder), height=720, width=1280, frames=49, tokens=77)
    assert found.latents == (13, 90, 160)
    assert [block.flops for block in found.graph.blocks] == [wan_flops(WAN, 13 * 45 * 80, 77)] * 2


def test_flops_on_meta_are_those_on_the_cpu() -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 2, "text_dim": 32}
    counted = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = WanTransformer3DModel(**config)
        counted.append(count_flops(model, ["blocks.0", "blocks.1"], example_inputs(model)))
    assert counted[0] == counted[1]
    assert counted[0][1]["blocks.0"] == wan_flops(config, 3 * 4 * 4, 16)


@pytest.mark.e2e
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    config, latents = FAMILIES[name]
    found = inspect_model(str(written(tmp_path, config))).to_dict()
    assert (found["latents"], found["no_flops_because"]) == (latents, "")
    assert len(found["blocks"]) >= 2
    assert all(block["parameters"] > 0 and block["flops"] > 0 and block["streams"] for block in found["blocks"])
    for key in ("parameters", "flops"):
        assert sum(stack[key] for stack in found["stacks"]) == sum(block[key] for block in found["blocks"]) < found[key]


def test_a_class_without_example_inputs_is_still_listed(tmp_path: Path) -> None:
    config = {
        "_class_name": "AllegroTransformer3DModel",
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 4,
    }
    folder = written(tmp_path, config)
    found = json.loads(cli("inspect", folder, "--json").stdout)
    assert [block["path"] for block in found["blocks"]] == [f"transformer_blocks.{index}" for index in range(4)]
    assert found["flops"] is None
    assert all(block["flops"] is None and block["parameters"] > 0 for block in found["blocks"])
    reason = "no example inputs are known for AllegroTransformer3DModel, so it was not run"
    assert found["no_flops_because"] == reason
    told = cli("inspect", folder, "--out", tmp_path / "graph.svg")
    assert f"FLOPs not counted: {reason}" in told.stdout
    assert (tmp_path / "graph.svg").read_text().startswith("<?xml")


def test_what_removals_would_leave(tmp_path: Path) -> None:
    config = WAN | {"num_layers": 10, "num_attention_heads": 2, "ffn_dim": 512, "text_dim": 64}
    found = inspect_model(str(written(tmp_path, config)), height=64, width=64, frames=5)
    few, many = found.removals
    assert few.removed == ("blocks.3", "blocks.4", "blocks.5", "blocks.6")
    assert few.blocks == 6
    assert set(few.removed) < set(many.removed)
    for left in (few, many):
        gone = [found.graph.block(path) for path in left.removed]
        assert left.parameters == found.graph.parameters - sum(block.parameters for block in gone)
        assert left.parameters <= (1 - left.share) * found.graph.parameters
        assert left.flops == found.graph.flops - sum(block.flops for block in gone)
    told = cli("inspect", tmp_path, "--height", 64, "--width", 64, "--frames", 5).stdout
    assert "what removals would leave (the middle blocks, by parameters: there are no importance scores):" in told
    assert f"removing 30 % leaves 6 blocks, {few.parameters:,} parameters (" in told


def test_what_cannot_be_removed_is_said(tmp_path: Path) -> None:
    config = WAN | {"num_layers": 1, "num_attention_heads": 2, "ffn_dim": 512, "text_dim": 64}
    found = inspect_model(str(written(tmp_path, config)), height=64, width=64, frames=5)
    assert found.removals[0].problem.startswith("remove: 0.3 of the parameters asked for; ")


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (
            {"frames": 80},
            "--frames: 80 given, expected 1 plus a multiple of 4 for this model, such as 77 or 81",
        ),
        (
            {"height": 470},
            "--height: 470 given, expected a multiple of 16 for this model, such as 464 or 480",
        ),
        (
            {"width": 3},
            "--width: 3 given, expected a multiple of 16 for this model, such as 16 or 32",
        ),
    ],
)
def test_a_size_that_cannot_be_made(size: dict[str, int], told: str, tmp_path: Path) -> None:
    folder = written(tmp_path, WAN | {"num_layers": 1})
    with pytest.raises(RequestError) as caught:
        inspect_model(str(folder), **size)
    assert str(caught.value) == told


def test_an_image_model_makes_no_clips(tmp_path: Path) -> None:
    failed = cli("inspect", written(tmp_path, FAMILIES["Flux"][0]), "--frames", 5)
    assert failed.exit_code == 2
    assert failed.stderr == "error: --frames: 5 given, expected 1, as this model makes images\n"


@pytest.mark.e2e
def test_pictures(tmp_path: Path) -> None:
    config = WAN | {"num_layers": 21, "num_attention_heads": 1, "ffn_dim": 64, "text_dim": 32}
    folder = written(tmp_path, config)
    out = tmp_path / "graph.svg"
    told = cli("inspect", folder, "--height", 64, "--width", 64, "--out", out)
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines()[-1] == str(out)
    found = inspect_model(str(folder), height=64, width=64)
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        draw_inspection(found, tmp_path / f"graph{suffix}")
        assert (tmp_path / f"graph{suffix}").read_bytes().startswith(start)
    drawn = (tmp_path / "graph.svg").read_text()
    assert "WanTransformer3DModel: 21 blocks" in drawn
    assert "30 % removed: " in drawn
    for out, message in (
        (tmp_path / "graph.gif", "graph.gif given, expected a file that ends in .svg, .png, .pdf"),
        (tmp_path / "none" / "graph.svg", "none: no such folder; make it first"),
    ):
        failed = cli("inspect", folder, "--out", out)
        assert failed.exit_code == 2
        assert message in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "graph.pdf", "graph.png", "graph.svg"]
