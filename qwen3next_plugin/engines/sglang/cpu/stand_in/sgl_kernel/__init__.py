"""Stand-in for `sgl_kernel` without a GPU: the part that SGLang 0.5.23 uses there.

Do not define the operator `convert_weight_packed` here: SGLang takes it for a sign of the genuine
package, and would then call AMX code that needs the rest of that package.
"""

from sgl_kernel import attention as attention  # registers its operators
from sgl_kernel import murmur_hash as murmur_hash  # likewise
from sgl_kernel import unserved as unserved  # likewise
from sgl_kernel.cache_locations import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    fill_accept_out_cache_loc_cpu,
)
from sgl_kernel.kv_copy import copy_all_layer_kv_cache_cpu
from sgl_kernel.tokens import fill_bonus_tokens_cpu, rotate_input_ids_cpu
from sgl_kernel.tree import build_tree_kernel_efficient_cpu, verify_tree_greedy_cpu

__version__ = "0.5.23+qwen3next"

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
]
