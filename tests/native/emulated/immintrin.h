// The instructions of engine_instructions.h in plain C++, as Intel's guide describes them: a processor
// without AVX-512 or VNNI can run what is written for them. The compiler finds this file before its own (-isystem).

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

template <int kBytes>
struct Emulated {
  static constexpr int kSize = kBytes;
  union {
    int8_t i8[kBytes];
    uint8_t u8[kBytes];
    int16_t i16[kBytes / 2];
    int32_t i32[kBytes / 4];
  };
};
typedef Emulated<32> __m256i;
typedef Emulated<64> __m512i;
typedef uint64_t __mmask64;

namespace emulated {

inline int16_t saturated(int sum) { return int16_t(sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum); }

template <class V>
V load(const void* from) {
  V to;
  std::memcpy(&to, from, V::kSize);
  return to;
}
template <class V>
V set1_epi32(int32_t x) {
  V to;
  for (int32_t& each : to.i32) each = x;
  return to;
}
template <class V>
V set1_epi16(int16_t x) {
  V to;
  for (int16_t& each : to.i16) each = x;
  return to;
}
template <class V>
V add_epi32(V a, V b) {
  for (int i = 0; i < V::kSize / 4; ++i) a.i32[i] = int32_t(uint32_t(a.i32[i]) + uint32_t(b.i32[i]));
  return a;
}
template <class V>
V abs_epi8(V a) {
  for (int8_t& each : a.i8) each = int8_t(std::abs(each));
  return a;
}
template <class V>
V sign_epi8(V a, V b) {
  for (int i = 0; i < V::kSize; ++i) a.i8[i] = int8_t(b.i8[i] < 0 ? -a.i8[i] : b.i8[i] ? a.i8[i] : 0);
  return a;
}
// Bytes without a sign times bytes with one, in pairs.
template <class V>
V maddubs_epi16(V a, V b) {
  V to;
  for (int i = 0; i < V::kSize / 2; ++i)
    to.i16[i] = saturated(a.u8[2 * i] * b.i8[2 * i] + a.u8[2 * i + 1] * b.i8[2 * i + 1]);
  return to;
}
template <class V>
V madd_epi16(V a, V b) {
  V to;
  for (int i = 0; i < V::kSize / 4; ++i)
    to.i32[i] = int32_t(uint32_t(a.i16[2 * i] * b.i16[2 * i]) + uint32_t(a.i16[2 * i + 1] * b.i16[2 * i + 1]));
  return to;
}
// The same bytes in fours, without saturation.
template <class V>
V dpbusd_epi32(V sums, V a, V b) {
  for (int i = 0; i < V::kSize; ++i) sums.i32[i / 4] = int32_t(uint32_t(sums.i32[i / 4]) + uint32_t(a.u8[i] * b.i8[i]));
  return sums;
}

}  // namespace emulated

inline __m256i _mm256_setzero_si256() { return emulated::set1_epi32<__m256i>(0); }
inline __m256i _mm256_loadu_si256(const __m256i* from) { return emulated::load<__m256i>(from); }
inline void _mm256_storeu_si256(__m256i* to, __m256i a) { std::memcpy(static_cast<void*>(to), &a, sizeof(a)); }
inline __m256i _mm256_set1_epi32(int x) { return emulated::set1_epi32<__m256i>(x); }
inline __m256i _mm256_set1_epi16(short x) { return emulated::set1_epi16<__m256i>(x); }
inline __m256i _mm256_add_epi32(__m256i a, __m256i b) { return emulated::add_epi32(a, b); }
inline __m256i _mm256_abs_epi8(__m256i a) { return emulated::abs_epi8(a); }
inline __m256i _mm256_sign_epi8(__m256i a, __m256i b) { return emulated::sign_epi8(a, b); }
inline __m256i _mm256_maddubs_epi16(__m256i a, __m256i b) { return emulated::maddubs_epi16(a, b); }
inline __m256i _mm256_madd_epi16(__m256i a, __m256i b) { return emulated::madd_epi16(a, b); }
inline __m256i _mm256_dpbusd_avx_epi32(__m256i sums, __m256i a, __m256i b) { return emulated::dpbusd_epi32(sums, a, b); }

inline __m512i _mm512_setzero_si512() { return emulated::set1_epi32<__m512i>(0); }
inline __m512i _mm512_loadu_si512(const void* from) { return emulated::load<__m512i>(from); }
inline void _mm512_storeu_si512(void* to, __m512i a) { std::memcpy(to, &a, sizeof(a)); }
inline __m512i _mm512_set1_epi32(int x) { return emulated::set1_epi32<__m512i>(x); }
inline __m512i _mm512_set1_epi16(short x) { return emulated::set1_epi16<__m512i>(x); }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return emulated::add_epi32(a, b); }
inline __m512i _mm512_abs_epi8(__m512i a) { return emulated::abs_epi8(a); }
inline __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) { return emulated::maddubs_epi16(a, b); }
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) { return emulated::madd_epi16(a, b); }
inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) { return emulated::dpbusd_epi32(sums, a, b); }
inline __mmask64 _mm512_movepi8_mask(__m512i a) {
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= __mmask64(a.i8[i] < 0) << i;
  return mask;
}
inline __m512i _mm512_mask_sub_epi8(__m512i source, __mmask64 mask, __m512i a, __m512i b) {
  for (int i = 0; i < 64; ++i)
    if (mask >> i & 1) source.i8[i] = int8_t(a.i8[i] - b.i8[i]);
  return source;
}
