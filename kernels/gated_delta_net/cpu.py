"""The layer on a CPU: its three native ops."""

from qwen3next_plugin.kernels.causal_conv1d import cpu as causal_conv1d
from qwen3next_plugin.kernels.gated_delta_net.parts import in_parts
from qwen3next_plugin.kernels.gated_delta_rule import cpu as gated_delta_rule
from qwen3next_plugin.kernels.rms_norm_gated import cpu as rms_norm_gated

run = in_parts(causal_conv1d.run, gated_delta_rule.run, rms_norm_gated.run)
