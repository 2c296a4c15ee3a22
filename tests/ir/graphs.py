"""Small block graphs for the tests of the intermediate representation."""

from __future__ import annotations

from flcompress.ir.block import Block, Flow, Stream, TensorSpec
from flcompress.ir.graph import BlockGraph, Edge

SPEC = TensorSpec(shape=(1, 6, 8), dtype="float32")
TEXT = TensorSpec(shape=(1, 4, 8), dtype="float32")


def block(stack: str, index: int, *, both: bool = False, parameters: int = 100) -> Block:
    """A block of one stream, or of two that it returns as (text, video)."""
    video = Stream(input="hidden_states", output=1 if both else 0, spec=SPEC)
    text = Stream(input="encoder_hidden_states", output=0, spec=TEXT)
    return Block(
        path=f"{stack}.{index}",
        stack=stack,
        index=index,
        kind="JointBlock" if both else "SingleBlock",
        streams=(text, video) if both else (video,),
        parameters=parameters,
        flops=2 * parameters,
        outputs=2 if both else 0,
    )


def two_stacks(joint: int, single: int) -> BlockGraph:
    """`joint` blocks of two streams, then their concatenation through `single` blocks of one stream."""
    blocks = [*(block("joint", i, both=True) for i in range(joint)), *(block("single", i) for i in range(single))]
    flows: dict[Edge, set[Flow]] = {}
    ends = {"encoder_hidden_states": ("input", "prompt", TEXT), "hidden_states": ("input", "latents", SPEC)}
    for one in blocks:
        taken = [stream.input for stream in one.streams]
        for name, (producer, source, spec) in ends.items():
            target = name if name in taken else "hidden_states"
            flows.setdefault((producer, one.path), set()).add(Flow(source=source, target=target, spec=spec))
        ends = {stream.input: (one.path, str(stream.output), stream.spec) for stream in one.streams}
    for producer, source, spec in ends.values():
        flows.setdefault((producer, "output"), set()).add(Flow(source=source, target="0", spec=spec))
    graph = BlockGraph(
        model_class="TwoStacks",
        parameters=1000 + 100 * len(blocks),
        flops=5000 + 200 * len(blocks),
        blocks=blocks,
        flows=flows,
        config_keys={"joint": "num_layers", "single": "num_single_layers"},
    )
    graph.verify()
    return graph
