"""Time and peak memory of cutting a large checkpoint on disk, and whether every kept byte is the same.

`python docs/measurements/prune.py [FOLDER]` writes a random bfloat16 Wan of about 5 GB to a temporary folder
(in FOLDER), removes 30 % of it in a process of its own, compares, and deletes everything again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LAYERS, HEADS = 30, 18
CHILD = """
import json, resource, sys, time
from pathlib import Path
started = time.monotonic()
from flcompress.tracing.removal.on_disk import remove_on_disk
done = remove_on_disk(Path(sys.argv[1]), json.loads(sys.argv[3]), Path(sys.argv[2]))
print(json.dumps({
    "seconds": time.monotonic() - started,
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    "stand_in": done.stand_in,
    "names": dict(done.names),
}))
"""


def write_checkpoint(folder: Path) -> int:
    """Shards of random bytes that are finite bfloat16 numbers; returns their number of bytes."""
    from flcompress.models.loading import meta_transformer

    folder.mkdir()
    config = {
        "_class_name": "WanTransformer3DModel", "num_layers": LAYERS, "num_attention_heads": HEADS,
        "attention_head_dim": 128, "ffn_dim": 8960, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
        "freq_dim": 256, "patch_size": [1, 2, 2], "rope_max_seq_len": 1024,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    state = meta_transformer(folder).state_dict()
    for name, tensor in state.items():
        if held > 10**9:
            shards.append({})
            held = 0
        shards[-1][name] = tuple(tensor.shape)
        held += 2 * tensor.numel()
    places, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard.items():
            size = 2 * state[name].numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}  # type: ignore[dict-item]
            places[name] = file
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for done in range(0, at, 1 << 24):
                piece = bytearray(os.urandom(min(1 << 24, at - done)))
                piece[1::2] = bytes(byte & 0xBF for byte in piece[1::2])  # exponents below the one that means infinity
                out.write(piece)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return total


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor."""
    from flcompress.models.shards import folder_tensors

    found = {}
    for name, tensor in folder_tensors(folder).items():
        digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
        for piece in tensor.pieces():
            digest.update(piece)
        found[name] = digest.hexdigest()
    return found


def main() -> None:
    place = Path(tempfile.mkdtemp(prefix="flcompress-prune-", dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        size = write_checkpoint(place / "large")
        gone = [f"blocks.{index}" for index in range(10, 10 + LAYERS * 3 // 10)]
        child = [sys.executable, "-c", CHILD, str(place / "large"), str(place / "small"), json.dumps(gone)]
        told = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        before, after = digests(place / "large"), digests(place / "small")
        same = after == {new: before[old] for new, old in told["names"].items()}
        print(f"checkpoint {size / 1e9:.2f} GB, {len(before)} tensors; removed {', '.join(gone)}")
        print(f"certified on a stand-in: {told['stand_in']}")
        print(f"{told['seconds']:.1f} s, peak {told['peak_mb']:.0f} MB; kept {len(after)} tensors, identical: {same}")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
