"""What an engine says of Qwen4-Exp where this extra is deleted."""

import os
import sys
from pathlib import Path

from engines.without_extras import copy_without
from extras.qwen4_exp.model import write_qwen4_exp
from patience import run


def check_refused(folder: Path, reading: str) -> None:
    """`reading`, a statement in which `model` is the checkpoint, ends in an error that names it."""
    env, model = copy_without(folder), write_qwen4_exp(folder / "model", wrapped=True)
    done = run([sys.executable, "-c", f"model = {str(model)!r}; {reading}"], env=os.environ | env)
    assert done.returncode
    assert "model_type = 'qwen4_exp': it needs the extra qwen4_exp" in done.stderr
