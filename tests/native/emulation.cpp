// Compares emulated/immintrin.h with the processor's own AVX2, on all bytes and with sums that saturate.

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

namespace copy {
#include "emulated/immintrin.h"
}

template <class Real, class Copy>
void demand_equal(const Real& real, const Copy& copied, const char* what) {
  static_assert(sizeof(real) == sizeof(copied));
  if (std::memcmp(&real, &copied, sizeof(real)) == 0) return;
  std::printf("%s is another\n", what);
  std::exit(1);
}

int main() {
  std::mt19937 random(0);
  int8_t bytes[3][32];
  for (int round = 0; round < 100000; ++round) {
    for (auto& each : bytes)
      for (int8_t& byte : each) byte = random() % 4 ? int8_t(random()) : random() % 2 ? 127 : -128;
    __m256i a, b;
    copy::__m256i c, d;
    std::memcpy(&a, bytes[0], 32), std::memcpy(&b, bytes[1], 32), std::memcpy(&c, &a, 32), std::memcpy(&d, &b, 32);
    demand_equal(_mm256_add_epi32(a, b), copy::_mm256_add_epi32(c, d), "add_epi32");
    demand_equal(_mm256_abs_epi8(a), copy::_mm256_abs_epi8(c), "abs_epi8");
    demand_equal(_mm256_sign_epi8(a, b), copy::_mm256_sign_epi8(c, d), "sign_epi8");
    demand_equal(_mm256_maddubs_epi16(a, b), copy::_mm256_maddubs_epi16(c, d), "maddubs_epi16");
    demand_equal(_mm256_madd_epi16(a, b), copy::_mm256_madd_epi16(c, d), "madd_epi16");
    demand_equal(_mm256_set1_epi16(bytes[2][0]), copy::_mm256_set1_epi16(bytes[2][0]), "set1_epi16");
    demand_equal(_mm256_set1_epi32(bytes[2][0]), copy::_mm256_set1_epi32(bytes[2][0]), "set1_epi32");
  }
}
