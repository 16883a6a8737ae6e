"""Memory in pages of 2 MiB, for both engines on a CPU."""

import os

TORCH_SETTING = "THP_MEM_ALLOC_ENABLE"


def use_huge_pages() -> None:
    """Let torch ask Linux for huge pages, in every process that starts from now on.

    A decode step reads all weights once; from pages of 4 KiB that takes 1.1 to 1.25 times as long.
    `THP_MEM_ALLOC_ENABLE=0` keeps small pages. Without effect where the machine has no transparent
    huge pages (`/sys/kernel/mm/transparent_hugepage/enabled` says `never`).
    """
    os.environ.setdefault(TORCH_SETTING, "1")
