"""The linear-attention names that SGLang imports at module level; the plugin brings its own."""

from sgl_kernel.unserved import refused

_GDN, _KDA = "SGLang's own Gated DeltaNet", "SGLang's Gated DeltaNet or Kimi Delta Attention"

causal_conv1d_fn_cpu = refused("causal_conv1d_fn_cpu", _GDN)
causal_conv1d_update_cpu = refused("causal_conv1d_update_cpu", _KDA)
chunk_gated_delta_rule_cpu = refused("chunk_gated_delta_rule_cpu", _GDN)
