"""Kinds of tensors of adapters, and their shapes for a weight.

LoRA (Hu et al. 2021), DoRA (Liu et al. 2024), LoHa (Hyeon-Woo et al. 2022) and LoKr (Yeh et al. 2024) as PEFT, kohya
and LyCORIS name their tensors, and full differences and values as ComfyUI names them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

Shape = tuple[int, ...]

_HALF = r"(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.(?!weight|bias)[\w-]+)?\.(?:weight|bias)"
_ALONE = (
    r"alpha|scalar|diff|diff_b|diff_m|set_weight|reshape_weight|w_norm|b_norm|dora_scale|lora_mid\.weight"
    r"|lora_magnitude_vector(?:\.[\w-]+)?(?:\.weight)?|lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12]"
)
_ENDING = re.compile(rf"\.(?:{_HALF}|{_ALONE})$")
_WHOLE = re.compile(r"\.(?:modules_to_save\.[\w-]+\.|base_layer\.)?(weight|bias)$")
"""Names of what PEFT saves next to an adapter: modules trained in full, and biases."""


def module_of(key: str) -> tuple[str, str] | None:
    """Return (module, kind of tensor) of a key; None if it is no tensor of an adapter."""
    match = _ENDING.search(key)
    if match is None:
        return None
    module, kind = key[: match.start()], match[0][1:]
    # ComfyUI gives the difference of a module's own parameter, a block's modulation, to the module.
    return (f"{module}.modulation", kind) if kind == "diff_m" else (module, kind)


def is_between_halves(key: str) -> bool:
    """Return whether a tensor stands between two halves, and so decides their layout."""
    return key.endswith((".lora_mid.weight", ".lokr_t2", ".hada_t1", ".hada_t2"))


def saved_module_of(key: str) -> tuple[str, str] | None:
    """Return (module, "weight" or "bias") of a tensor that is saved in full; None for any other key."""
    match = _WHOLE.search(key)
    return (key[: match.start()], match[1]) if match else None


def misfit(kind: str, shape: Shape, weight: Shape, others: dict[str, int]) -> str:
    """Return how an adapter's tensor does not fit a weight; "" if it fits.

    Args:
        kind: kind from `module_of`.
        shape: shape of the tensor.
        weight: shape [out, in, ...] of the weight, or of the parameter.
        others: findings about earlier tensors of the same module, to which this call adds its own.
    """
    rule = next((rule for pattern, rule in _RULES.items() if re.match(pattern, kind)))
    return rule(kind, shape, weight, others)


def _exactly(expected: Shape, shape: Shape) -> str:
    return "" if shape == expected else f"expected {list(expected)}"


def _like_weight(kind: str, shape: Shape, weight: Shape, others: dict[str, int]) -> str:
    return _exactly(weight, shape)


def _like_bias(kind: str, shape: Shape, weight: Shape, others: dict[str, int]) -> str:
    return _exactly(weight[:1], shape)


def _number(kind: str, shape: Shape, weight: Shape, others: dict[str, int]) -> str:
    return "" if shape in ((), (1,)) else "expected []"


def _sizes(kind: str, shape: Shape, weight: Shape, others: dict[str, int]) -> str:
    return _exactly((len(weight),), shape)


def _magnitude(kind: str, shape: Shape, weight: Shape, others: dict[str, int]) -> str:
    return "" if math.prod(shape) in weight[:2] else f"expected one for each of {weight[0]} rows"


def _half(kind: str, shape: Shape, weight: Shape, others: dict[str, int]) -> str:
    """Check B or A, also for a convolution with a tensor between them (LoCon)."""
    if kind.endswith("bias"):
        return _exactly(weight[:1], shape)
    down = kind.startswith(("lora_A", "lora_down", "lora.down"))
    unit_sides = (1,) * (len(weight) - 2)
    tails = ((weight[1:], (*weight[1:2], *unit_sides)) if "between" in others else (weight[1:],)) if down else ()
    if len(shape) != len(weight) or (shape[1:] not in tails if down else shape[0] != weight[0]):
        wanted = ["rank", *weight[1:]] if down else [weight[0], "rank", *unit_sides]
        return f"expected [{', '.join(map(str, wanted))}] for a weight {list(weight)}"
    rank = shape[0] if down else shape[1]
    known = others.setdefault("rank", rank)
    return "" if rank == known else f"its other half has rank {known}"


def _between(kind: str, shape: Shape, weight: Shape, others: dict[str, int]) -> str:
    """Check the tensor between the halves of a convolution (LoCon, or Tucker's form of LoHa and LoKr)."""
    others["between"] = 1
    good = len(shape) == len(weight) and shape[2:] == weight[2:]
    return "" if good else f"expected {' x '.join(['rank', 'rank', *map(str, weight[2:])])}"


def _hadamard(kind: str, shape: Shape, weight: Shape, others: dict[str, int]) -> str:
    """Check a factor of (w1_a w1_b) * (w2_a w2_b); with a tensor t the halves of a convolution are transposed."""
    rows, columns = weight[0], math.prod(weight[1:])
    good = rows in shape if kind.endswith("_a") else shape[1:] in ((columns,), weight[1:2])
    side = rows if kind.endswith("_a") else columns
    return "" if len(shape) == 2 and good else f"expected one side of {side} for a weight {list(weight)}"


def _kronecker(kind: str, shape: Shape, weight: Shape, others: dict[str, int]) -> str:
    """Check a factor of w1 (x) w2, each of which may be a product a b; with a tensor t, those of w2 are transposed."""
    factor, transposed = kind[:7], "between" in others and kind.startswith("lokr_w2_")
    sides = {}
    if not kind.endswith("_b"):
        sides["rows"] = (shape[-1] if transposed else shape[0], weight[0])
    if not kind.endswith("_a"):
        sides["columns"] = (math.prod(shape[1:]), weight[1] if transposed else math.prod(weight[1:]))
    other = {"lokr_w1": "lokr_w2", "lokr_w2": "lokr_w1"}[factor]
    for side, (count, total) in sides.items():
        others[f"{factor} {side}"] = count
        partner = others.get(f"{other} {side}")
        if total % count or (partner is not None and "between" not in others and partner * count != total):
            return f"its {side} do not make {total} for a weight {list(weight)}"
    return ""


_RULES: dict[str, Callable[[str, Shape, Shape, dict[str, int]], str]] = {
    r"lora_mid": _between,
    r"lora_magnitude_vector|dora_scale": _magnitude,
    r"lora": _half,
    r"alpha|scalar": _number,
    r"diff_b|b_norm|bias": _like_bias,
    r"diff|set_weight|w_norm": _like_weight,
    r"reshape_weight": _sizes,
    r"lokr_t2|hada_t": _between,
    r"hada_w": _hadamard,
    r"lokr_w": _kronecker,
}
