"""The block size that the cache is laid out with outlives the host's second configuration."""

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from checkpoints import SHIPPED

LAID_OUT = 384  # tokens, as the host has it once there is room for a state page


def configured(**flags) -> VllmConfig:
    """What an engine process has when its workers are ready, and after it configures once more."""
    config = EngineArgs(model=str(SHIPPED), **flags).create_engine_config()
    config.cache_config.block_size = LAID_OUT
    return config


def test_stays():
    config = configured()
    config.__post_init__()
    assert config.cache_config.block_size == LAID_OUT


def test_a_size_that_was_asked_for_stays_too():
    config = EngineArgs(model=str(SHIPPED), block_size=256).create_engine_config()
    assert config.cache_config.block_size == 256
    config.__post_init__()
    assert config.cache_config.block_size == 256


@pytest.mark.compat
def test_the_host_still_takes_it_back():
    """Fails when vLLM leaves it alone: `cpu/block_size.py` can go then."""
    config = configured()
    config.cache_config.user_specified_block_size = False
    config.__post_init__()
    assert config.cache_config.block_size == 128
