// All arithmetic of engine_compiled.cpp that depends on the processor. The compiler's flags choose the instruction set
// (`compiler_flags` in engine_program.py).
//
// A product in 8 bits multiplies states and weights that are integers from -127 to 127. The sum of two products is at
// most 2 * 127 * 127 = 32,258 and fits into 16 bits, so no instruction below saturates. The sums are exact, and the
// same on every processor.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

// The registers hold a block of kRows rows and kVectors vectors of sums.
#if defined(__AVX512BW__)
constexpr int kLanes = 16, kRows = 6;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 3;
#elif defined(__ARM_NEON)
constexpr int kLanes = 4, kRows = 6;
#else
constexpr int kLanes = 4, kRows = 3;
#endif
constexpr int kVectors = 4, kPanel = kVectors * kLanes;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

// Every instruction set defines:
//   kOffset  what is added to a state before it is stored as a byte
//   Sums     kLanes sums of 32 bits
//   Four     four states of one row, which are multiplied with the weights of many columns
//   zero(), load(int32_t*), store(int32_t*, Sums)
//   multiply_add(sums, four, weights): adds four products to each lane's sum. The four weights of a lane are adjacent
//   in `weights`.
#if defined(__AVX512BW__)

typedef __m512i Sums;
inline Sums zero() { return _mm512_setzero_si512(); }
inline Sums load(const int32_t* from) { return _mm512_loadu_si512(from); }
inline void store(int32_t* to, Sums sums) { _mm512_storeu_si512(to, sums); }

#if defined(__AVX512VNNI__)
// The instruction multiplies unsigned by signed bytes.
constexpr int kOffset = 128;
struct Four {
  __m512i states;
  explicit Four(int32_t bytes) : states(_mm512_set1_epi32(bytes)) {}
};
inline Sums multiply_add(Sums sums, const Four& x, const int8_t* weights) {
  return _mm512_dpbusd_epi32(sums, x.states, _mm512_loadu_si512(weights));
}
#else
constexpr int kOffset = 0;
// x w = |x| (w sign(x))
struct Four {
  __m512i sizes;
  __mmask64 negative;
  explicit Four(int32_t bytes)
      : sizes(_mm512_abs_epi8(_mm512_set1_epi32(bytes))), negative(_mm512_movepi8_mask(_mm512_set1_epi32(bytes))) {}
};
inline Sums multiply_add(Sums sums, const Four& x, const int8_t* weights) {
  const __m512i w = _mm512_loadu_si512(weights);
  const __m512i pairs = _mm512_maddubs_epi16(x.sizes, _mm512_mask_sub_epi8(w, x.negative, zero(), w));
  return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

#elif defined(__AVX2__)

typedef __m256i Sums;
inline Sums zero() { return _mm256_setzero_si256(); }
inline Sums load(const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store(int32_t* to, Sums sums) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sums); }

#if defined(__AVXVNNI__)
constexpr int kOffset = 128;
struct Four {
  __m256i states;
  explicit Four(int32_t bytes) : states(_mm256_set1_epi32(bytes)) {}
};
inline Sums multiply_add(Sums sums, const Four& x, const int8_t* weights) {
  return _mm256_dpbusd_avx_epi32(sums, x.states, load(reinterpret_cast<const int32_t*>(weights)));
}
#else
constexpr int kOffset = 0;
// x w = |x| (w sign(x))
struct Four {
  __m256i states, sizes;
  explicit Four(int32_t bytes) : states(_mm256_set1_epi32(bytes)), sizes(_mm256_abs_epi8(states)) {}
};
inline Sums multiply_add(Sums sums, const Four& x, const int8_t* weights) {
  const __m256i w = load(reinterpret_cast<const int32_t*>(weights));
  const __m256i pairs = _mm256_maddubs_epi16(x.sizes, _mm256_sign_epi8(w, x.states));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

#elif defined(__ARM_NEON)

constexpr int kOffset = 0;
typedef int32x4_t Sums;
inline Sums zero() { return vdupq_n_s32(0); }
inline Sums load(const int32_t* from) { return vld1q_s32(from); }
inline void store(int32_t* to, Sums sums) { vst1q_s32(to, sums); }
struct Four {
  int8x16_t states;
  explicit Four(int32_t bytes) : states(vreinterpretq_s8_s32(vdupq_n_s32(bytes))) {}
};
inline Sums multiply_add(Sums sums, const Four& x, const int8_t* weights) {
  const int8x16_t w = vld1q_s8(weights);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sums, x.states, w);
#else
  // Products of two lanes, then of the other two. Adjacent pairs are added until each lane has one sum.
  const int16x8_t low = vmull_s8(vget_low_s8(x.states), vget_low_s8(w));
  const int16x8_t high = vmull_s8(vget_high_s8(x.states), vget_high_s8(w));
  return vaddq_s32(sums, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

#else

constexpr int kOffset = 0;
typedef int32_t Sums __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(alignof(int32_t)), may_alias));
inline Sums zero() { return Sums{}; }
inline Sums load(const int32_t* from) { return *reinterpret_cast<const Sums*>(from); }
inline void store(int32_t* to, Sums sums) { *reinterpret_cast<Sums*>(to) = sums; }
struct Four {
  int8_t states[4];
  explicit Four(int32_t bytes) { std::memcpy(states, &bytes, 4); }
};
inline Sums multiply_add(Sums sums, const Four& x, const int8_t* weights) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) sums[lane] += x.states[i] * weights[4 * lane + i];
  return sums;
}

#endif

}  // namespace
