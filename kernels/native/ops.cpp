// Registers the ops with torch and chooses the instruction set that runs them.
#include "ops.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "step.h"

namespace baseline {
extern const Level level;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Level level;
}
namespace avx512 {
extern const Level level;
}
namespace avx512bf16 {
extern const Level level;
}
namespace amx {  // only the op whose tasks change with AMX is compiled for it
void paged_attention_op(StableIValue* stack, uint64_t inputs, uint64_t outputs);
const Level level = [] {
  Level level = avx512bf16::level;
  level.name = "amx";
  level.paged_attention_op = &paged_attention_op;
  return level;
}();
}  // namespace amx
#elif defined(__aarch64__)
namespace dotprod {
extern const Level level;
}
namespace i8mm {
extern const Level level;
}
#endif

namespace {

#if defined(__x86_64__)
// Asks the system for AMX's tile registers; false if this process may not use them.
bool request_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The instruction sets that this processor has, lowest first.
std::vector<const Level*> available() {
  std::vector<const Level*> levels{&baseline::level};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    levels.push_back(&avx2::level);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      levels.push_back(&avx512::level);
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
        levels.push_back(&avx512bf16::level);
        if (__builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
            __builtin_cpu_supports("avx512vbmi") && request_amx())
          levels.push_back(&amx::level);
      }
    }
  }
#elif defined(__aarch64__)
  constexpr auto kI8mm = HWCAP2_I8MM | HWCAP2_BF16;
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
    levels.push_back(&dotprod::level);
    if ((getauxval(AT_HWCAP2) & kI8mm) == kI8mm) levels.push_back(&i8mm::level);
  }
#endif
  return levels;
}

std::atomic<const Level*> active{available().back()};

bool has_amx(const Level* level) { return level->name == std::string("amx"); }

}  // namespace

std::atomic<bool> native::use_amx{has_amx(active)};

namespace {

int64_t grid() { return baseline::kGrid; }

std::string isa() { return active.load()->name; }

// Names separated by commas, lowest first.
std::string isa_levels() {
  std::string names;
  for (const Level* level : available())
    names += (names.empty() ? "" : ",") + std::string(level->name);
  return names;
}

void set_isa(std::string name) {
  for (const Level* level : available()) {
    if (name == level->name) {
      active = level;
      native::use_amx = has_amx(level);
      return;
    }
  }
  throw std::runtime_error("instruction set " + name +
                           " is not available here; available: " + isa_levels());
}

// Runs an op at the instruction set in use.
template <Boxed Level::* op>
void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  (active.load(std::memory_order_relaxed)->*op)(stack, inputs, outputs);
}

}  // namespace

STABLE_TORCH_LIBRARY(qwen3next, m) {
  m.def("grid() -> int");
  m.def("isa() -> str");
  m.def("isa_levels() -> str");
  m.def("set_isa(str name) -> ()");
#define OP(name, schema) m.def(#name schema);
#include "ops.def"
#undef OP
}

STABLE_TORCH_LIBRARY_IMPL(qwen3next, CompositeExplicitAutograd, m) {
  m.impl("grid", TORCH_BOX(&grid));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isa_levels", TORCH_BOX(&isa_levels));
  m.impl("set_isa", TORCH_BOX(&set_isa));
}

STABLE_TORCH_LIBRARY_IMPL(qwen3next, CPU, m) {
#define OP(name, schema) m.impl(#name, &call<&Level::name##_op>);
#include "ops.def"
#undef OP
}
