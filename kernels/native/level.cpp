// The table of this instruction set's ops.
#include "ops.h"

#define Q3N_STRING_(x) #x
#define Q3N_STRING(x) Q3N_STRING_(x)

namespace Q3N_LEVEL {

extern const Level level;
const Level level = {
    .name = Q3N_STRING(Q3N_LEVEL),
#define OP(name, schema) .name##_op = &name##_op,
#include "ops.def"
#undef OP
};

}  // namespace Q3N_LEVEL
