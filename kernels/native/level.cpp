// This instruction set's row of the operator table.
#include "ops.h"

#define Q3N_STRING_(x) #x
#define Q3N_STRING(x) Q3N_STRING_(x)

namespace Q3N_LEVEL {

extern const Level level;
const Level level = {Q3N_STRING(Q3N_LEVEL),
                     {TORCH_BOX(&causal_conv1d), TORCH_BOX(&gated_delta_rule), TORCH_BOX(&rms_norm),
                      TORCH_BOX(&rms_norm_gated), TORCH_BOX(&qk_norm_rope), TORCH_BOX(&output_gate),
                      TORCH_BOX(&draft_head), TORCH_BOX(&fused_moe), TORCH_BOX(&paged_attention),
                      TORCH_BOX(&router), TORCH_BOX(&shared_expert_gate)}};

}  // namespace Q3N_LEVEL
