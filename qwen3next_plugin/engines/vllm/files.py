"""Where the files of a checkpoint are."""

from pathlib import Path

from vllm.config import VllmConfig

from qwen3next_plugin.engines.hub import local_folder


def weights_folder(vllm_config: VllmConfig) -> Path:
    """The folder of the checkpoint that is served; downloads one of a hub."""
    model_config = vllm_config.model_config
    downloads = vllm_config.load_config.download_dir
    return local_folder(model_config.model, model_config.revision, downloads)
