"""Print the options with which pip installs a CPU build of the locked torch.

On x86-64 the default index has CUDA builds, which do not import without CUDA's libraries. A CPU
build is marked `+cpu`: there is one in pip's own indexes and links, or in the given index.

    python requirements/cpu_torch.py requirements/torch.txt https://index.example/cpu
"""

import platform
import subprocess
import sys
from pathlib import Path

NAMES = ("torch", "torchvision")


def taken(name: str, version: str, options: list[str]) -> str:
    """The build of this version that pip would take, or why there is none."""
    pip = [sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check"]
    command = [*pip, "--retries", "1", "--timeout", "30", *options, name]
    done = subprocess.run(command, capture_output=True, text=True)
    listed = done.stdout.partition("Available versions: ")[2].partition("\n")[0].split(", ")
    builds = [build for build in listed if build.split("+")[0] == version]
    return builds[0] if builds else (done.stderr.strip().splitlines() or ["not listed"])[-1]


def main(lock: str, *index: str) -> None:
    pins = dict(line.partition("==")[::2] for line in Path(lock).read_text().splitlines())
    for options in ([], *([f"--extra-index-url={url}"] for url in index)):
        found = {name: taken(name, pins[name], options) for name in NAMES}
        if all(build.endswith("+cpu") for build in found.values()):
            print(*options)
            return
    sys.exit(
        f"No CPU build of torch {pins['torch']} for Python {platform.python_version()} "
        f"({platform.machine()}): pip's own indexes have none, and neither has "
        f"{' '.join(index) or 'another'}, if it can be reached. Name an index that has one: make "
        f"TORCH_INDEX=<address>. pip finds {found}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
