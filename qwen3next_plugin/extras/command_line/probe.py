"""Checks that `doctor` runs in a separate process, because they may abort it.

`python -m …probe kernels` (`vllm`, `sglang`) prints one line of JSON, or fails.
"""

import json
import os
import sys


def kernels() -> dict[str, str]:
    """Run a kernel on each device once; a description of the kernels by device."""
    import torch

    from qwen3next_plugin import env
    from qwen3next_plugin.kernels import native
    from qwen3next_plugin.kernels.rms_norm import rms_norm

    x, found, on_gpu = torch.ones(1, 16), {}, torch.cuda.is_available()
    if env.kernels() != "triton" or not on_gpu:
        # ends the process if the kernel uses an instruction that the processor lacks
        rms_norm(x=x, weight=torch.zeros(16), eps=1e-6)
        if env.kernels() == "reference":
            return {"cpu": "reference, correct and slow: QWEN3NEXT_KERNELS=reference"}
        runs = ", ".join(native.levels())
        found["cpu"] = f"native, {native.isa()}; this processor runs {runs}"
        found["cpu, quantised"] = _formats()
    if on_gpu and env.kernels() != "cpu":
        import triton

        from qwen3next_plugin.kernels.gpu.configs import architecture

        x = x.cuda()
        rms_norm(x=x, weight=torch.zeros_like(x[0]), eps=1e-6)
        found["cuda"] = f"Triton {triton.__version__}, for {architecture(x.device)}"
    return found


def _formats() -> str:
    """Multiply by a weight of each format once; their names."""
    import torch

    from qwen3next_plugin.kernels.linear import linear, pack_fp8, pack_int4, pack_int8

    values, scale = torch.ones(16, 128), torch.ones(16, 1)
    weights = {
        "FP8": pack_fp8(values.to(torch.float8_e4m3fn), scale),
        "int8": pack_int8(values.to(torch.int8), scale),
        "int4": pack_int4(values[:, ::2].to(torch.uint8), scale),
    }
    for weight in weights.values():
        linear(values, weight)
    return ", ".join(weights)


def vllm() -> dict[str, str]:
    """vLLM's platform, and the module that serves each architecture."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from qwen3next_plugin.engines.vllm.plugin import registered

    return registered()


def sglang() -> dict[str, str]:
    """SGLang's platform, and the module that serves each architecture."""
    from qwen3next_plugin.engines.sglang.plugin import registered

    return registered()


if __name__ == "__main__":
    print(json.dumps({"kernels": kernels, "vllm": vllm, "sglang": sglang}[sys.argv[1]]()))
