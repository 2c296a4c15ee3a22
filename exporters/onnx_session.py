"""An exported ONNX denoiser, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from flcompress.errors import UnavailableError
from flcompress.exporters.parity import Inputs

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxSession:
    """Callable as a `flcompress.exporters.parity.Denoiser`."""

    def __init__(self, model: Path, device: Literal["cpu", "cuda"] = "cpu") -> None:
        """Load `model` (its external data beside it).

        Raises:
            UnavailableError: ONNX Runtime did not take the device; it falls back to the CPU without a word.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # as torch has, so that the two compare fairly
        options.log_severity_level = 3  # errors; what else it says is about its own optimiser
        wanted = PROVIDERS[device]
        # A provider this build lacks is left out of the list here, because ONNX Runtime would only warn about it.
        chosen = [name for name in (wanted, PROVIDERS["cpu"]) if name in onnxruntime.get_available_providers()]
        self.session = onnxruntime.InferenceSession(str(model), options, providers=list(dict.fromkeys(chosen)))
        self.provider = str(self.session.get_providers()[0])
        if self.provider != wanted:
            raise UnavailableError(
                f"{model}: ONNX Runtime runs it on {self.provider}, {wanted} was asked for; "
                "pip uninstall onnxruntime, pip install 'flcompress[onnxruntime-gpu]', and check the CUDA libraries"
            )

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        given = {name: tensor.detach().cpu().float().numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(self.session.run(None, given)[0])
