"""torch's C++ compiler, for both engines on a CPU."""

import os
import platform
import sys

TORCH_SETTING = "TORCHINDUCTOR_VEC_ISA_OK"


def skip_trials() -> None:
    """Let torch compile for this processor's vectors without trials, in every process, on x86.

    torch compiles a large file for each instruction set that the processor has, 12 s in all, at the
    first graph of a machine, and under vLLM at that of each model. The small files for AVX-512
    BF16, VNNI and AMX, which an older compiler may lack, are still tried. A value that somebody has
    given stays (`TORCHINDUCTOR_VEC_ISA_OK=try`: all trials).
    """
    if platform.machine() != "x86_64" or os.environ.setdefault(TORCH_SETTING, "1") != "1":
        return
    if torch_config := sys.modules.get("torch._inductor.config"):  # has read the variable
        torch_config.cpp.vec_isa_ok = True
