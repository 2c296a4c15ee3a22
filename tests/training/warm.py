"""Imported once by the fork server: what every process of a training would import anew, for seconds."""

import gc
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import diffusers.pipelines.wan.pipeline_wan
    import torch.distributed.fsdp
    import torch.nn.parallel

import flcompress.cli
import flcompress.driver.manager
import flcompress.evaluation.comparison
import flcompress.passes
import flcompress.training.engines.fsdp
import flcompress.training.engines.zero
import flcompress.training.loop
import tests.training.toy

gc.freeze()  # DeepSpeed collects garbage often, which would walk over all that was imported here

__all__ = ["deepspeed", "diffusers", "flcompress", "tests", "torch"]
