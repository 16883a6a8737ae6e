// Multiplications of numbers in registers, by the instructions of the packed linear layers. Each
// function does `rounds` rounds and returns how many multiplications that was.
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kVectors = 12;  // sums that do not wait for each other
constexpr int kTiles = 4;

// Calls step(sum) for each sum, in rounds. The compiler can neither drop nor join the calls.
template <class Step>
void repeat(int64_t rounds, Step&& step) {
  __m512 sums[kVectors] = {};
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = step(sums[v]);
      asm volatile("" : "+v"(sums[v]));
    }
  }
}

// Tiles of 16 rows of 64 bytes, all zero.
void configure() {
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

}  // namespace

extern "C" {

int64_t vdpbf16ps(int64_t rounds) {
  __m512i x = _mm512_set1_epi16(0x3f00);  // 0.5
  asm volatile("" : "+v"(x));
  repeat(rounds, [=](__m512 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x); });
  return rounds * kVectors * 32;
}

int64_t vpdpwssd(int64_t rounds) {
  __m512i x = _mm512_set1_epi16(3);
  asm volatile("" : "+v"(x));
  repeat(rounds, [=](__m512 sum) { return (__m512)_mm512_dpwssd_epi32((__m512i)sum, x, x); });
  return rounds * kVectors * 32;
}

int64_t vpdpbusd(int64_t rounds) {
  __m512i x = _mm512_set1_epi8(3);
  asm volatile("" : "+v"(x));
  repeat(rounds, [=](__m512 sum) { return (__m512)_mm512_dpbusd_epi32((__m512i)sum, x, x); });
  return rounds * kVectors * 64;
}

int64_t tdpbf16ps(int64_t rounds) {
  configure();
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return rounds * kTiles * 16 * 16 * 32;
}

int64_t tdpbssd(int64_t rounds) {
  configure();
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return rounds * kTiles * 16 * 16 * 64;
}
}
