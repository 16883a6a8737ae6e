"""SGLang's caches where the home cannot be written."""

import os
import subprocess
import sys

SHOW = """
import os, sglang
from sglang.srt.platforms import current_platform
current_platform.device_name
for name in ("SGLANG_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
    print(os.environ.get(name))
"""


def folders(tmp_path, **named: str) -> list[str]:
    """Those that SGLang, PyTorch and Triton use."""
    env = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    env |= {"HOME": "/dev/null", "TMPDIR": str(tmp_path)} | named
    done = subprocess.run([sys.executable, "-c", SHOW], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-3:]


def test_they_are_in_a_temporary_folder(tmp_path):
    folder = f"{tmp_path}/sglang-{os.getuid()}"
    assert folders(tmp_path) == [folder, f"{folder}/inductor", f"{folder}/triton"]


def test_named_folders_stay(tmp_path):
    own = f"{tmp_path}/named"
    found = folders(tmp_path, SGLANG_CACHE_DIR=own)
    assert found == [own, f"{own}/inductor", f"{own}/triton"]
    folder = f"{tmp_path}/sglang-{os.getuid()}"
    found = folders(tmp_path, TRITON_CACHE_DIR=own)
    assert found == [folder, f"{folder}/inductor", own]
