"""Bugs that the tests of `make test` must find.

    python tests/seeded_bugs.py [NAME…]    in vLLM's environment, or in SGLang's for its own

Seeds one after the other in a copy of the tree and runs the tests that should find it, until one
fails. Exits with 1 if a bug is not found. Run it before and after tests are merged or left out.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engines.without_extras import copy_tree, imported_first
from qwen3next_plugin.kernels.native import LIBRARY


@dataclass(frozen=True, slots=True)
class Bug:
    path: str
    right: str  # once in the file
    wrong: str
    tests: tuple[str, ...]  # files, or one test


ENGINES = ("vllm", "sglang")
BUGS: Mapping[str, Bug] = {
    "the decay has the wrong sign": Bug(
        "kernels/gated_delta_rule/cells.h",
        "const float step = g(i);",
        "const float step = -g(i);",
        ("tests/kernels/test_gated_delta_rule.py",),
    ),
    "a query sees the next position": Bug(
        "kernels/native/sequences.h",
        "if (!mask) return context + query + 1;",
        "if (!mask) return context + std::min(query + 2, tokens);",
        ("tests/kernels/test_paged_attention.py",),
    ),
    "threads share scratch memory": Bug(
        "kernels/paged_attention/tiles.h",
        "thread_local Scratch scratch;",
        "static Scratch scratch;",
        ("tests/kernels/test_paged_attention.py", "tests/kernels/test_sequences.py"),
    ),
    "a rejected draft is kept": Bug(
        "qwen3next_plugin/engines/vllm/speculation/logit_rows.py",
        "next(wrong, len(drafts)) + 1",
        "min(next(wrong, len(drafts)) + 2, len(drafts) + 1)",
        ("tests/engines/vllm/test_sampler.py", "tests/engines/vllm/test_parity.py"),
    ),
    "a rejected draft's random numbers are used up": Bug(
        "qwen3next_plugin/engines/vllm/speculation/sampler.py",
        "generator.set_state(state)",
        "pass",
        ("tests/engines/vllm/test_sampler.py", "tests/engines/vllm/test_sampling_params.py"),
    ),
    "a page of another block is read": Bug(
        "qwen3next_plugin/engines/vllm/state/steps.py",
        "np.maximum(common.seq_lens.numpy() - 1, 0)",
        "common.seq_lens.numpy()",
        ("tests/engines/vllm/test_steps.py", "tests/engines/vllm/test_prefix_cache.py"),
    ),
    "a cached page is one chunk late": Bug(
        "qwen3next_plugin/engines/sglang/state/snapshots.py",
        "min(n, (seqlens[i] - prefix[i]) // chunk * chunk)",
        "min(n, (seqlens[i] - prefix[i] + chunk) // chunk * chunk)",
        ("tests/engines/sglang/test_on_device.py",),
    ),
    "a wrong draft is followed": Bug(
        "qwen3next_plugin/engines/sglang/speculation/verify.py",
        "if node >= 0:\n                going_on",
        "if node >= 0 or child[request][0] > 0 == accepted:\n                going_on",
        ("tests/engines/sglang/test_verify.py", "tests/engines/sglang/test_parity.py"),
    ),
    "pending tokens are read in the wrong order": Bug(
        "mtp/pending.py",
        "in_order = [place for step in zip(*places, strict=True) for place in step]",
        "in_order = [place for each in places for place in each]",
        ("tests/mtp/test_pending.py", "tests/mtp/test_loop.py"),
    ),
    "drafts go beyond a request's end": Bug(
        "mtp/loop.py",
        "row.draft = min(row.draft, self.usable_drafts(row.request, row.tokens.end))",
        "row.draft = row.draft",
        ("tests/mtp/test_loop.py", "tests/mtp/test_replay.py"),
    ),
    "ranks choose other lengths": Bug(
        "mtp/loop.py",
        "self.ranks.world_size > 1",
        "self.ranks.world_size > 2",
        ("tests/mtp/test_loop.py", "tests/engines/vllm/test_ranks.py"),
    ),
    "a zero point is one too low": Bug(
        "qwen3next_plugin/model/quantisation/schemes.py",
        "zero = _unpacked(zero.T.contiguous(), bits)[:, : module.channels].T",
        "zero = (_unpacked(zero.T.contiguous(), bits)[:, : module.channels].T - 1).clamp(0)",
        ("tests/model/test_quantisation.py",),
    ),
    "too many drafts are not refused": Bug(
        "qwen3next_plugin/config/__init__.py",
        "not 1 <= num_drafts <= MAX_SPECULATIVE_TOKENS",
        "not 1 <= num_drafts",
        ("tests/config/test_config.py",),
    ),
}


def build(tree: Path) -> Path:
    """The native library of a copy's sources, compiled again where they changed."""
    folder = tree / "build"
    if not folder.exists():
        settings = ("-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}")
        _run("cmake", "-S", str(tree), "-B", str(folder), *settings)
    _run("cmake", "--build", str(folder), "--target", "_ops", f"-j{os.cpu_count()}")
    return next(folder.glob("_ops*.so"))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def found_by(bug: Bug, tree: Path, env: Mapping[str, str]) -> str | None:
    """The first test that fails with the bug, if one does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *bug.tests], cwd=tree, env=os.environ | env, capture_output=True, text=True
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode not in (0, 1) or (done.returncode and not failed):
        sys.exit(f"the tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[0].split()[1] if failed else None


def main(names: list[str]) -> None:
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        tree, env = copy_tree(Path(folder)), imported_first(Path(folder))
        library = Path(folder) / "path" / "qwen3next_plugin" / "kernels" / LIBRARY
        installed = library.readlink()
        for name in names or BUGS:
            bug = BUGS[name]
            if any(f"/engines/{each}/" in bug.path and not find_spec(each) for each in ENGINES):
                continue
            path = tree / bug.path
            right = path.read_text("utf-8")
            assert right.count(bug.right) == 1, f"{bug.path} has changed: {bug.right}"
            path.write_text(right.replace(bug.right, bug.wrong), "utf-8")
            library.unlink()
            library.symlink_to(build(tree) if path.suffix == ".h" else installed)
            test = found_by(bug, tree, env)
            print(f"{name}: {test or 'NOT FOUND'}", flush=True)
            missed += [] if test else [name]
            path.write_text(right, "utf-8")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main(sys.argv[1:])
