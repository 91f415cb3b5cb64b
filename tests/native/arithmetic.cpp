// Checks the arithmetic of engine_instructions.h, as it is compiled here, against sums in 64 bits: every
// state times every weight, beside the largest products there are.

#include "engine_instructions.h"

#include <cstdio>
#include <random>

int main() {
  std::mt19937 random(0);
  const auto any = [&] { return int(random() % 255) - 127; };
  const auto largest = [&] { return random() % 2 ? 127 : -127; };
  for (int state = -127; state <= 127; ++state)
    for (int weight = -127; weight <= 127; ++weight) {
      const bool extreme = random() % 2;
      int states[4];
      int8_t weights[4 * kLanes];
      uint8_t bytes[4];
      for (int& each : states) each = extreme ? largest() : any();
      for (int8_t& each : weights) each = int8_t(extreme ? largest() : any());
      const int place = random() % 4;
      states[place] = state;
      for (int lane = 0; lane < kLanes; ++lane) weights[4 * lane + place] = int8_t(weight);
      for (int i = 0; i < 4; ++i) bytes[i] = uint8_t(states[i] + kOffset);

      // As in a product: the sums begin with what the offset adds, with its sign turned.
      int32_t sums[kLanes], four;
      int64_t expected[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        expected[lane] = sums[lane] = int32_t(random() % 2000001) - 1000000;
        for (int i = 0; i < 4; ++i) {
          sums[lane] -= kOffset * weights[4 * lane + i];
          expected[lane] += states[i] * weights[4 * lane + i];
        }
      }
      std::memcpy(&four, bytes, 4);
      store(sums, multiply_add(load(sums), Four(four), weights));
      int32_t zeros[kLanes];
      store(zeros, zero());
      for (int lane = 0; lane < kLanes; ++lane)
        if (sums[lane] != expected[lane] || zeros[lane] != 0) {
          std::printf("state %d, weight %d, lane %d: %d, not %lld\n", state, weight, lane, sums[lane],
                      static_cast<long long>(expected[lane]));
          return 1;
        }
    }
}
