"""SGLang with its plugins, imported once where the servers of tests are forked from.

NAMES: what each scheduler would import, for 0.6 s. ENVIRONMENT: what importing it has set. The
library of the native kernels is loaded here, too, so QWEN3NEXT_ISA does nothing in a fork.
"""

import gc
import os
from importlib import import_module

OURS = "qwen3next_plugin.engines.sglang"
NAMES = (
    *("sglang.srt.entrypoints.http_server", "sglang.srt.managers.tp_worker"),
    *("sglang.srt.models.registry", "sglang.srt.dllm.algorithm"),
    *("sglang.srt.layers.attention.hybrid_linear_attn_backend", "transformers.models.qwen3_next"),
    *(f"{OURS}.model.wrapped", f"{OURS}.model.of_extras", f"{OURS}.metrics"),
    *(f"{OURS}.state.steps", f"{OURS}.cpu.attention", "sglang.srt.speculative.eagle_worker_v2"),
)
gc.disable()  # for nothing is garbage yet
_before = dict(os.environ)
import_module("sglang.srt.plugins").load_plugins()
for name in NAMES:
    import_module(name)
import_module("qwen3next_plugin.kernels.dispatch").load("cpu")
ENVIRONMENT = {name: value for name, value in os.environ.items() if _before.get(name) != value}
gc.freeze()  # else each fork looks through all of that whenever it collects garbage
gc.enable()
