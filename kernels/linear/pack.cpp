#include <atomic>
#include <cstring>
#include <vector>

#include "ops.h"
#include "packed_weight.h"
#include "tensor.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kTask = 1 << 18;  // bytes that a task packs, at least

// The lower nibbles of four bytes as the lower half, the upper ones as the upper half.
uint32_t by_parity(uint32_t x) {
  const auto even = [](uint32_t nibbles) {
    nibbles &= 0x0f0f0f0f;
    nibbles = (nibbles | nibbles >> 4) & 0x00ff00ff;
    return (nibbles | nibbles >> 8) & 0xffff;
  };
  return even(x) | even(x >> 4) << 16;
}

// The same of bytes: 0, 2, 1, 3.
uint32_t bytes_by_parity(uint32_t x) {
  return (x & 0xff0000ff) | (x & 0xff00) << 8 | (x & 0xff0000) >> 8;
}

// Writes 16 rows, `stride` bytes apart and `line` bytes long, as lines of one unit of each row.
template <class Unit, class Ordered>
void interleave(uint8_t* out, const uint8_t* rows, int64_t stride, int64_t line,
                Ordered&& ordered) {
  for (int64_t at = 0; at < line; at += sizeof(Unit)) {
    Unit units[kPanelWidth];
    for (int64_t r = 0; r < kPanelWidth; ++r) {
      std::memcpy(units + r, rows + r * stride + at, sizeof(Unit));
    }
    for (Unit& unit : units) unit = ordered(unit);
    std::memcpy(out + at * kPanelWidth, units, sizeof(units));
  }
}

void interleave(uint8_t* out, const uint8_t* rows, int64_t stride, int64_t line,
                Encoding encoding) {
  switch (encoding) {
    case kInt8:
      return interleave<uint16_t>(out, rows, stride, line, [](uint16_t x) { return x; });
    case kInt4:
    case kNvfp4:
    case kMxfp4:
      return interleave<uint32_t>(out, rows, stride, line, by_parity);
    case kFp8:
      return interleave<uint32_t>(out, rows, stride, line, bytes_by_parity);
    case kBf16:
      return interleave<uint32_t>(out, rows, stride, line, [](uint32_t x) { return x; });
  }
}

bool has_nan(const uint8_t* codes, int64_t count) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= (codes[i] & 127) == 127;
  return found;
}

// Matrices of `rows` [E, N, bytes] as panels [E, ⌈N/16⌉, 16 · line], padded with zeros.
Tensor pack_panels(Tensor rows, int64_t encoding, int64_t line) {
  const int64_t E = rows.size(0), N = rows.size(1), bytes = rows.size(2);
  const int64_t panels = (N + kPanelWidth - 1) / kPanelWidth;
  Tensor out = empty_as(rows, {E, panels, kPanelWidth * line});
  const uint8_t* in = read<uint8_t>(rows);
  std::atomic<bool> bad{false};
  parallel(E * panels, 1 + kTask / (kPanelWidth * line + 1), [&](int64_t i) {
    const int64_t first = i % panels * kPanelWidth,
                  count = std::min<int64_t>(N - first, kPanelWidth);
    const uint8_t* from = in + (i / panels * N + first) * bytes;
    if (Encoding(encoding) == kFp8 && has_nan(from, count * bytes)) bad = true;
    int64_t stride = bytes;
    std::vector<uint8_t> padded;
    if (count < kPanelWidth || bytes < line) {
      padded.resize(kPanelWidth * line);
      for (int64_t r = 0; r < count; ++r) {
        std::memcpy(padded.data() + r * line, from + r * bytes, bytes);
      }
      from = padded.data(), stride = line;
    }
    interleave(write<uint8_t>(out) + i * kPanelWidth * line, from, stride, line,
               Encoding(encoding));
  });
  if (bad) throw std::invalid_argument("pack_fp8: values has NaN");
  return out;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP(pack_panels)
