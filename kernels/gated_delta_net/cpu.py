"""The layer on a CPU: its three native ops."""

from qwen3next_plugin.kernels.causal_conv1d.cpu import causal_conv1d
from qwen3next_plugin.kernels.gated_delta_net.parts import in_parts
from qwen3next_plugin.kernels.gated_delta_rule.cpu import gated_delta_rule
from qwen3next_plugin.kernels.rms_norm_gated.cpu import rms_norm_gated

gated_delta_net = in_parts(causal_conv1d, gated_delta_rule, rms_norm_gated)
