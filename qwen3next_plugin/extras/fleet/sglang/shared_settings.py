"""The settings that servers must share to read each other's pages and KV."""

from typing import Any

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.hub import READ_HERE
from qwen3next_plugin.engines.sglang.files import weights_folder
from qwen3next_plugin.engines.sglang.names import logger
from qwen3next_plugin.extras.fleet.computed_by import computed_by
from qwen3next_plugin.model.checkpoint.fingerprint import fingerprint
from qwen3next_plugin.versions import check_host

LINKER_FLAG = "--enable-unified-cache-external-linker"
MODE_FLAG = "--disaggregation-mode"


def settings_of(server_args: Any, model_config: Any, *sizes: Any) -> tuple[Any, ...]:
    """All that the contents of pages and KV depend on, except the weights.

    Args: sizes: of what is kept, on this rank.
    """
    # KV is laid out as the attention backend reads it.
    computed = computed_by(model_config.hf_config, str(check_host("sglang")))
    return sizes, server_args.attention_backend, computed


def weights(server_args: Any) -> str:
    """The fingerprint of the checkpoint."""
    return fingerprint(weights_folder(server_args), logger.info)


def check_known_weights(server_args: Any, reader: str, flag: str) -> None:
    """Refuse weights that `reader` could not tell apart by their files.

    Args: flag: the one that asks for the reader.

    Raises:
        ConfigError: names the setting and the fix.
    """
    if server_args.enable_lora or server_args.lora_paths:
        raise ConfigError(
            f"--enable-lora: {reader} knows an adapter by its name only, whatever its weights "
            f"were; serve without adapters, or leave out {flag}"
        )
    if server_args.load_format not in READ_HERE:
        raise ConfigError(
            f"--load-format {server_args.load_format}: {reader} knows weights by their safetensors "
            f"files; leave it out, or leave out {flag}"
        )


def refuse_other_weights(server_args: Any) -> None:
    """Refuse new weights if pages of the old ones would be used with them."""
    if server_args.enable_unified_cache_external_linker:
        why = "FolderLinker would serve prefixes of the weights that it started with"
        flag = LINKER_FLAG
    elif server_args.disaggregation_mode != "null":
        why, flag = "both servers compare a digest of weights that is computed at start", MODE_FLAG
    else:
        return
    raise ConfigError(f"{why}; restart the server, or serve without {flag}")
