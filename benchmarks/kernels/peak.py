"""How many numbers in registers this machine multiplies in a second: what no kernel can exceed."""

import ctypes
import functools
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

SETS = ("avx512bw", "avx512bf16", "avx512vnni", "amx-tile", "amx-bf16", "amx-int8")
VECTORS, TILES = ("vdpbf16ps", "vpdpwssd", "vpdpbusd"), ("tdpbf16ps", "tdpbssd")
ROUNDS = dict.fromkeys(VECTORS, 2**19) | dict.fromkeys(TILES, 2**16)


def peak(instruction: str) -> float:
    """Multiplications a second by an instruction, on as many threads as torch uses; a few ms."""
    run, rounds = getattr(library(), instruction), ROUNDS[instruction]
    with ThreadPoolExecutor(threads := torch.get_num_threads()) as pool:
        list(pool.map(run, [1] * threads))
        begin = time.perf_counter()
        count = sum(pool.map(run, [rounds] * threads))
        return count / (time.perf_counter() - begin)


@functools.cache
def library() -> ctypes.CDLL:
    """peak.cpp, compiled; needs AVX-512 BF16 and, to call the functions of tiles, AMX in use."""
    source = Path(__file__).with_suffix(".cpp")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "peak.so"
        compiler = os.environ.get("CXX", "c++")
        flags = ("-O2", "-std=c++20", "-shared", "-fPIC", *(f"-m{name}" for name in SETS))
        subprocess.run([compiler, *flags, str(source), "-o", str(file)], check=True)
        loaded = ctypes.CDLL(str(file))
    for name in ROUNDS:
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    return loaded
