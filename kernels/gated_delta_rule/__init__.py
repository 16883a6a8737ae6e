"""The gated delta rule over the state pages of a batch: decode, verify and prefill rows alike."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.gated_delta_rule.arguments import RuleInputs, RuleWeights
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step


def gated_delta_rule(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    pool_: StatePool,
    step: Step,
) -> Tensor:
    """S = exp(g_t) S; u_t = beta_t (v_t - S^T k_t); S = S + k_t u_t^T; o_t = S^T q_t.

    g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b); q and k are L2-normalised here
    (epsilon 1e-6 inside the root) and q is scaled by K^-1/2.

    S is written, and rounded to its own dtype, at positions that are multiples of GRID; a page's
    rings keep the tokens after that position. A row of n <= num_drafts + 1 tokens can be rolled
    back to any of them: S does not advance past the row's context length c, and span becomes
    (c, c + n). All tokens of a longer row are final: span becomes (c + n, c + n). Outputs depend on
    the tokens only, not on how steps split them into rows.

    Shapes:
        q, k: [T, H, K], v: [T, HV, V], a, b: [T, H, HV / H]; any strides but the last; K <= 256
        A_log, dt_bias: [HV], fp32 or the activations' dtype
        pool_: updates all but `conv`
        returns [T, HV, V]; zero in rows without a page

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: a row's tokens, slot or context length out of range; nothing is written.

    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464; transformers' Qwen3-Next.
    """
    run = dispatch.implementation("gated_delta_rule", q.device)
    return run(RuleInputs(q, k, v, a, b), RuleWeights(A_log, dt_bias), pool_, step)
