"""A folder for SGLang's caches where the home cannot be written: without one it does not start."""

import os

from sglang.srt.environ import envs, third_party_cache_defaults

from qwen3next_plugin.engines.sglang.names import logger
from qwen3next_plugin.machine.caches import instead_of

ROOT = "SGLANG_CACHE_DIR"


def provide_folder() -> None:
    """Name a temporary folder, unless SGLang can write its own or the user names one.

    Importing SGLang has already named its folder to PyTorch and Triton.
    Remove when SGLang starts without a folder.
    """
    own = envs.SGLANG_CACHE_DIR.get()
    if ROOT not in os.environ and (folder := instead_of(own, "sglang")):
        named = third_party_cache_defaults()
        os.environ[ROOT] = folder
        for variable, value in third_party_cache_defaults().items():
            if os.environ.get(variable) == named[variable]:
                os.environ[variable] = value
        logger.warning(
            "%s cannot be written: SGLang's caches are in %s; %s names another folder",
            *(own, folder, ROOT),
        )
