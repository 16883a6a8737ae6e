"""vLLM's worker with zentorch's kernels, on any processor: vLLM takes them on AMD's only."""

import vllm.platforms

vllm.platforms._is_amd_zen_cpu = lambda: True

from benchmarks.engines.vllm_worker import Engine  # noqa: E402 (the platform is chosen by then)
from benchmarks.worker import serve  # noqa: E402

if __name__ == "__main__":
    from vllm.platforms import current_platform

    if not current_platform.is_zen_cpu():
        raise RuntimeError("zentorch is not on the path: make .peers/zentorch/.installed")
    serve(Engine)
