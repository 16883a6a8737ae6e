"""A folder for vLLM's caches where the home cannot be written: without one it compiles nothing."""

import os

from vllm import envs
from vllm.logger import init_logger

from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.machine.caches import instead_of

logger = init_logger(LOGGER)

ROOT = "VLLM_CACHE_ROOT"


def provide_folder() -> None:
    """Name a temporary folder, unless vLLM can write its own or the user names one.

    Remove when vLLM compiles without a folder.
    """
    own = envs.VLLM_CACHE_ROOT
    if ROOT not in os.environ and (folder := instead_of(own, "vllm")):
        os.environ[ROOT] = folder
        logger.warning(
            "%s cannot be written: vLLM's caches are in %s; %s names another folder",
            *(own, folder, ROOT),
        )
