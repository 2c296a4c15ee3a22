"""A step of an ONNX export with bound memory against one that is handed arrays.

python -m docs.measurements.onnx_binding RUN [BATCH], where RUN has an ONNX export. Both run the same session in turn,
on the same inputs but for the latents, which change; the median of the ratio over rounds is printed with its quartiles.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from flcompress.driver.rundir import RunDirectory
from flcompress.runtime.inputs import Inputs, arguments_of, tensors_of
from flcompress.runtime.onnx_session import OnnxSession
from flcompress.runtime.sizes import size_of

ROUNDS = 200


def main(run: RunDirectory, batch: int) -> None:
    """Measure and print."""
    program = run.final()
    size = size_of(program, batch)
    inputs = tensors_of(arguments_of(program)(size, [500.0] * batch, 0))
    session = OnnxSession(run.exports / "onnx" / "model.onnx")
    torch.testing.assert_close(session(inputs), _arrays(session, inputs))
    bound, arrays = [], []
    for _ in range(ROUNDS):
        latents = torch.randn_like(inputs["hidden_states"])
        step = {**inputs, "hidden_states": latents}
        for call, seconds in ((session, bound), (lambda given: _arrays(session, given), arrays)):
            started = time.perf_counter()
            call(step)
            seconds.append(time.perf_counter() - started)
    ratios = [slow / fast for slow, fast in zip(arrays, bound, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"batch {batch}, {torch.get_num_threads()} threads, {ROUNDS} rounds: {1e3 * statistics.median(bound):.2f} ms "
        f"bound, {1e3 * statistics.median(arrays):.2f} ms with arrays; ratio {statistics.median(ratios):.3f} "
        f"({low:.3f} to {high:.3f})"
    )


def _arrays(session: OnnxSession, inputs: Inputs) -> torch.Tensor:
    feed = {spec.name: inputs[spec.name].numpy() for spec in session.session.get_inputs()}
    return torch.from_numpy(session.session.run(None, feed)[0])


if __name__ == "__main__":
    main(RunDirectory(Path(sys.argv[1])), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
