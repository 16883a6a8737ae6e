"""SGLang as it is before its plugins load, with their patches' targets; see tests/forks.py."""

import os
from importlib import import_module

from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide

# Besides what the plugin's patches import.
MODULES = ("srt.model_executor.cpu_graph_runner", "srt.speculative.eagle_utils")

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
provide()
for name in import_module("qwen3next_plugin.engines.sglang.patches").MODULES:
    import_module(f"qwen3next_plugin.engines.sglang.{name}")
for name in MODULES:
    import_module(f"sglang.{name}")
import_module("sglang.srt.platforms")._current_platform = None  # each fork looks for it anew
