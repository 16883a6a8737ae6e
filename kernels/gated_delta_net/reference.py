"""The layer as its three references."""

from qwen3next_plugin.kernels.causal_conv1d.reference import causal_conv1d
from qwen3next_plugin.kernels.gated_delta_net.parts import in_parts
from qwen3next_plugin.kernels.gated_delta_rule.reference import gated_delta_rule
from qwen3next_plugin.kernels.rms_norm_gated.reference import rms_norm_gated

gated_delta_net = in_parts(causal_conv1d, gated_delta_rule, rms_norm_gated)
