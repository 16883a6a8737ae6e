"""The settings that servers must share to read each other's pages and blocks of KV."""

from typing import Any, NamedTuple

import vllm
from vllm.config import VllmConfig
from vllm.logger import init_logger

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.hub import READ_HERE
from qwen3next_plugin.engines.vllm.files import weights_folder
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.engines.vllm.state.pages import largest_page
from qwen3next_plugin.extras.fleet.computed_by import computed_by
from qwen3next_plugin.model.checkpoint.fingerprint import fingerprint
from qwen3next_plugin.model.state import PageLayout

logger = init_logger(LOGGER)

PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
WITHOUT = "or leave out --kv-transfer-config"


class SharedSettings(NamedTuple):
    """All that the contents of pages and blocks depend on, except the weights."""

    layout: PageLayout
    rest: tuple[Any, ...]

    @property
    def dtype(self) -> str:
        """The activations' dtype, by name."""
        return str(self.layout.activation_dtype).removeprefix("torch.")


def settings_of(vllm_config: VllmConfig, config: Qwen3NextConfig) -> SharedSettings:
    """The settings that servers must share, of a server with these flags."""
    hf_config = vllm_config.model_config.hf_config
    # KV is laid out as vLLM's attention on this processor reads it.
    rest = vllm_config.cache_config.cache_dtype, *computed_by(hf_config, vllm.__version__)
    return SharedSettings(
        largest_page(config, vllm_config), (*rest, *_image_processing(vllm_config))
    )


def _image_processing(vllm_config: VllmConfig) -> list[Any]:
    """Settings that turn an image into pixels; vLLM's name of an image covers only its file."""
    if (multimodal_config := vllm_config.model_config.multimodal_config) is None:
        return []
    folder = weights_folder(vllm_config)
    files = (folder / name for name in PROCESSORS)
    texts = [file.read_text() if file.is_file() else "" for file in files]
    return [*texts, multimodal_config.mm_processor_kwargs]


def weights(vllm_config: VllmConfig) -> str:
    """The fingerprint of the checkpoint."""
    return fingerprint(weights_folder(vllm_config), logger.info)


def check_known_weights(vllm_config: VllmConfig, reader: str) -> None:
    """Refuse weights that `reader` could not tell apart by their files.

    Raises:
        ConfigError: names the setting and the fix.
    """
    load_format = vllm_config.load_config.load_format
    if vllm_config.lora_config is not None:
        raise ConfigError(
            f"enable_lora: {reader} knows an adapter by its path or name only, whatever its "
            f"weights were; serve without adapters, {WITHOUT}"
        )
    if load_format not in READ_HERE:
        raise ConfigError(
            f"load_format = {load_format}: {reader} knows weights by their safetensors files; "
            f"leave out --load-format, {WITHOUT}"
        )


def refuse_other_weights(vllm_config: VllmConfig) -> None:
    """Refuse new weights if pages of the old ones would be used with them."""
    if (transfer := vllm_config.kv_transfer_config) is not None:
        raise ConfigError(
            f"reload_weights: {transfer.kv_connector} would serve prefixes of the weights that it "
            "started with; restart the server, or serve without --kv-transfer-config"
        )
