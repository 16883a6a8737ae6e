"""min_p and logit_bias under speculation, which vLLM refuses request by request.

vLLM's rejection sampler knows neither, and `SamplingParams._validate_spec_decode` turns a request
with one away. Ours knows both (speculation/verify.py), so for our model the refusal is
lifted; anything else that vLLM refuses there, it still does. There is no setting for it, so the
method is replaced. For vLLM 0.32 and 0.33; can go when neither is refused: a test marked `compat`.
"""

import inspect
from copy import copy
from typing import Any

from vllm.sampling_params import SamplingParams

VALIDATE = SamplingParams._validate_spec_decode


def install(architecture: str) -> None:
    """Lift it for models of this architecture; idempotent."""
    found = list(inspect.signature(VALIDATE).parameters)
    if found != ["self", "speculative_config"]:
        raise RuntimeError(f"SamplingParams._validate_spec_decode takes {found}: not as we know it")

    def validate(self: SamplingParams, speculative_config: Any) -> None:
        if speculative_config is not None and _target(speculative_config) == architecture:
            self = copy(self)
            self.min_p, self.logit_bias = 0.0, None
        VALIDATE(self, speculative_config)

    SamplingParams._validate_spec_decode = validate


def _target(speculative_config: Any) -> str:
    return speculative_config.target_model_config.architecture
