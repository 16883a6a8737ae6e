"""Qwen4-Exp by transformers."""

from qwen3next_plugin.engines.extras import Additions, Models

ADDS = Additions(
    models=Models(
        trunks=dict.fromkeys(  # by model_type; a wrapper's text model too
            ("qwen4_exp", "qwen4_exp_text"), f"{__name__}.streams:Qwen4ExpForCausalLM"
        ),
    ),
)
