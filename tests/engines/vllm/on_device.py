"""Imported first by a fork: its engine runs on a CPU as the plugin runs on a GPU.

The Triton kernels, in Triton's interpreter, and steps that are built without a look at them. What
has no Triton kernel, because a GPU's engine brings its own, stays native.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

import interpreter

from qwen3next_plugin.engines.vllm.state import steps as backend
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.model.step import DeviceSteps

interpreter.interpret()
by_device, build = dispatch.backend, backend.StepBuilder.__init__


def native_where_there_is_no_other(op: str, device_type: str) -> str:
    return "cpu" if op in dispatch.NOT_IN_TRITON else by_device(op, device_type)


def with_steps_on_the_device(self: Any, *args: Any) -> None:
    build(self, *args)
    _, _, vllm_config, device = args
    self.on_device = DeviceSteps(vllm_config.scheduler_config.max_num_seqs + 1, device)


dispatch.backend = native_where_there_is_no_other
backend.StepBuilder.__init__ = with_steps_on_the_device
