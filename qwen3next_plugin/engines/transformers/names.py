"""Names and numbers that transformers and users of its `generate` meet."""

from packaging.version import Version

from qwen3next_plugin.versions import installed

DRAFTS = 3  # num_assistant_tokens, where it is not given
MOST_DRAFTS = 8
PREFIX = "mtp."  # of the MTP head's tensors
# The argument of layers and models that is the cache.
# drop when the minimum is 5.24: it is `cache` from there on
RENAMED = Version("5.24")
CACHE = "past_key_values" if (installed("transformers") or RENAMED) < RENAMED else "cache"
