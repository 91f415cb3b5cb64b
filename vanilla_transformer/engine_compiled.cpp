// The network and its searches as one program, for generate(compiled=True): greedy and beam search on a CPU, in float32
// or with products in 8 bits.
//
// It computes the same as engine_packed.py and decoding_beams.py, from the same weights, without calling torch for each
// product: in a small network those calls take longer than the products. No sum depends on the number of rows computed
// together, so a sentence's output does not depend on the others in the batch.
//
// All threads run the same functions and share the work of each loop (`Team`). Sizes in the comments: d d_model, V
// vocabulary, W beams of a sentence, K candidates. A row is a hypothesis, or in the encoder a source token.

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "engine_instructions.h"

namespace {

using Index = int64_t;

// Uninitialised memory, aligned to a cache line so that no vector register spans two.
struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Array = std::unique_ptr<T[], Free>;
using Buffer = Array<float>;

template <class T>
Array<T> array(Index size) {
  constexpr size_t kLine = 64;
  void* memory = std::aligned_alloc(kLine, (size * sizeof(T) / kLine + 1) * kLine);
  if (!memory) throw std::bad_alloc();
  return Array<T>(static_cast<T*>(memory));
}
Buffer buffer(Index size) { return array<float>(size); }

template <class T>
Array<T> zeros(Index size) {
  Array<T> made = array<T>(size);
  std::fill(&made[0], &made[0] + size, T{});
  return made;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNever = -1.0e9f;  // as in transformers: the score of what must never be chosen

// ---- Threads -------------------------------------------------------------------------------------------------------

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// A barrier for the threads of a search. A short wait spins. A longer one sleeps: if another program keeps a core busy,
// a waiting thread must leave its own core to a working one.
class Meeting {
 public:
  explicit Meeting(int size) : size_(size) {}

  void wait() {
    const int turn = turn_.load(std::memory_order_acquire);
    refuse_if_abandoned();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.fetch_add(1, std::memory_order_acq_rel);
      turn_.notify_all();
    } else {
      spin(turn);
      turn_.wait(turn, std::memory_order_acquire);
    }
    refuse_if_abandoned();
  }

  // Called when a thread has failed. The others stop at their next `wait`.
  void abandon() {
    abandoned_.store(true, std::memory_order_relaxed);
    turn_.fetch_add(1, std::memory_order_acq_rel);
    turn_.notify_all();
  }

  struct Abandoned {};

 private:
  void refuse_if_abandoned() const {
    if (abandoned_.load(std::memory_order_relaxed)) throw Abandoned();
  }

  // Longer than threads wait for each other if each has a core, and much shorter than another process's time slice.
  void spin(int turn) const {
    const auto end = Clock::now() + std::chrono::microseconds(200);
    do {
      for (int i = 0; i < 64; ++i)
        if (turn_.load(std::memory_order_acquire) != turn) return;
    } while (Clock::now() < end);
  }

  const int size_;
  std::atomic<int> arrived_{0}, turn_{0};
  std::atomic<bool> abandoned_{false};
};

// One of the threads that run a function in parallel.
struct Team {
  int rank, size;
  Meeting& meeting;

  // This thread's share of n pieces of work.
  std::pair<Index, Index> part(Index n) const { return {n * rank / size, n * (rank + 1) / size}; }

  void wait() const {
    if (size > 1) meeting.wait();
  }
};

// Starts a thread on another core than its creator's, whose core `creator_core()` is. Linux may start it on the same one,
// and leave both there for a tenth of a second. macOS has no such call.
#ifdef __linux__
int creator_core() { return sched_getcpu(); }

void leave(int core) {
  cpu_set_t cores;
  if (core < 0 || sched_getaffinity(0, sizeof cores, &cores)) return;
  CPU_CLR(core, &cores);
  if (CPU_COUNT(&cores)) sched_setaffinity(0, sizeof cores, &cores);
}
#else
int creator_core() { return -1; }

void leave(int) {}
#endif

// CPU time of this thread in seconds.
double core_seconds() {
  timespec spent{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &spent);
  return double(spent.tv_sec) + 1e-9 * double(spent.tv_nsec);
}

// Runs a search in pieces of some milliseconds, each with as many threads as there are free cores. If another
// process keeps a core busy, threads that share the remaining cores wait for each other, and
// together are slower than one alone.
class Crew {
 public:
  explicit Crew(Index threads) : all_(std::max<Index>(1, threads)) {}

  // How long a piece should last. Starting and ending one takes 0.1 ms.
  static constexpr std::chrono::milliseconds kPiece{20};

  // Calls `run(team)` in all threads, the caller's being the first. Rethrows the exception of the first thread to fail.
  template <class Run>
  void together(Run run) {
    const int size = int(std::min(all_, allowed()));
    Meeting meeting(size);
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
    std::atomic<double> worked{0.0};
    const auto fail = [&] {
      if (!failed.exchange(true)) failure = std::current_exception();
      meeting.abandon();
    };
    const int core = creator_core();
    const auto work = [&](int rank) {
      if (rank > 0) leave(core);
      const double before = core_seconds();
      try {
        run(Team{rank, size, meeting});
      } catch (const Meeting::Abandoned&) {
      } catch (...) {
        fail();
      }
      worked.fetch_add(core_seconds() - before);
    };
    std::vector<std::thread> others;
    const auto begin = Clock::now();
    try {
      for (int rank = 1; rank < size; ++rank) others.emplace_back(work, rank);
      work(0);
    } catch (...) {  // a thread could not be started
      fail();
    }
    for (std::thread& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
    judge(size, Seconds(Clock::now() - begin).count(), worked);
  }

 private:
  // After a second with fewer threads, try one more.
  Index allowed() const {
    return limit_.load(std::memory_order_relaxed) + (Clock::now().time_since_epoch().count() > until_.load());
  }

  // Threads with a core each are busy nearly all the time; waits between two parts of the work are short. A few crowded
  // pieces prove nothing: on idle cores too, a scheduler may leave two threads on one core for 0.3 s.
  void judge(Index size, double seconds, double worked) {
    if (size == 1 || seconds < 0.25 * Seconds(kPiece).count()) return;
    const bool crowded = worked < 0.75 * double(size) * seconds;
    const int strikes = std::max(0, strikes_ + (crowded ? 1 : -1));
    strikes_ = strikes < kStrikes ? strikes : kStrikes / 2;
    if (strikes == 0) limit_ = std::max<Index>(limit_, size);
    if (strikes < kStrikes) return;
    limit_ = size - 1;
    until_ = (Clock::now() + std::chrono::seconds(1)).time_since_epoch().count();
  }

  // So many more crowded pieces than others take a thread away.
  static constexpr int kStrikes = 16;

  const Index all_;
  // Shared by all searches of the process.
  static inline std::atomic<Index> limit_{std::numeric_limits<int>::max()};
  static inline std::atomic<Clock::rep> until_{0};
  static inline std::atomic<int> strikes_{0};
};

// ---- Arithmetic ----------------------------------------------------------------------------------------------------

// e^x for x <= 0, to 2e-7, in a form that compilers vectorise (the polynomial of Cephes' expf). Below -87: e^-87.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // rounds to an integer, in the last bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * std::bit_cast<float>((std::bit_cast<int32_t>(shifted) - 0x4B400000 + 127) << 23);
}

float maximum(const float* x, Index n) {
  float largest = -kInfinity;
#pragma omp simd reduction(max : largest)
  for (Index i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

float sum_of_exponentials(const float* x, Index n, float largest) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (Index i = 0; i < n; ++i) sum += exponential(x[i] - largest);
  return sum;
}

// The activation after a product. The numbers must match engine_compiled.py.
enum class Activation : Index { kNone, kRelu, kSilu, kGelu };

// In place, for a panel's columns.
void activate(Activation activation, float* x) {
  if (activation == Activation::kRelu) {
    for (int c = 0; c < kPanel; ++c) x[c] = x[c] < 0.0f ? 0.0f : x[c];
  } else if (activation == Activation::kSilu) {  // x / (1 + e^-x)
#pragma omp simd
    for (int c = 0; c < kPanel; ++c) {
      const float e = exponential(-std::fabs(x[c]));
      x[c] *= (x[c] < 0.0f ? e : 1.0f) / (1.0f + e);
    }
  } else if (activation == Activation::kGelu) {  // x P(X <= x); erf to 1.5e-7 by Abramowitz and Stegun, 7.1.26
#pragma omp simd
    for (int c = 0; c < kPanel; ++c) {
      const float z = std::fabs(x[c]) * 0.70710678118654752f;
      const float t = 1.0f / (1.0f + 0.3275911f * z);
      float y = 1.061405429f;
      y = y * t - 1.453152027f;
      y = y * t + 1.421413741f;
      y = y * t - 0.284496736f;
      y = y * t + 0.254829592f;
      const float half = 0.5f * y * t * exponential(-z * z);  // P(X > |x|)
      x[c] *= x[c] < 0.0f ? half : 1.0f - half;
    }
  }
}

// Unrolled early, the loops below keep their sums in registers.
#define UNROLL _Pragma("GCC unroll 8")

// Up to kRows rows of x times a panel: [in, kPanel] with a row stride of `panel_stride`. The inputs are summed in
// order, for any number of rows. b is added if given.
template <int R>
void block(const float* x, Index x_stride, Index in, const float* panel, Index panel_stride, const float* bias,
           Activation activation, float* y, Index y_stride, Index columns) {
  Vector sums[R][kVectors];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = bias ? *(const Vector*)(bias + v * kLanes) : Vector{};
  for (Index i = 0; i < in; ++i) {
    const Vector* w = (const Vector*)(panel + i * panel_stride);
    if constexpr (R == 1)  // one row only waits for the weights
      UNROLL for (int v = 0; v < kVectors; ++v) __builtin_prefetch(panel + (i + 16) * panel_stride + v * kLanes);
    UNROLL for (int r = 0; r < R; ++r)
      UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] += x[r * x_stride + i] * w[v];
  }
  UNROLL for (int r = 0; r < R; ++r) {
    float row[kPanel];
    UNROLL for (int v = 0; v < kVectors; ++v) *(Vector*)(row + v * kLanes) = sums[r][v];
    activate(activation, row);
    std::copy_n(row, columns, y + r * y_stride);
  }
}

// The same in 8 bits: four inputs at a time are multiplied and summed as integers. `offsets`, -kOffset times the sums
// of the weights, undo the offset that was added to the states.
template <int R>
void block(const uint8_t* x, Index x_stride, const float* x_scales, Index in, const int8_t* panel,
           const int32_t* offsets, const float* scales, const float* bias, Activation activation, float* y,
           Index y_stride, Index columns) {
  Sums sums[R][kVectors];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = load(offsets + v * kLanes);
  for (Index i = 0; i < in; i += 4) {
    UNROLL for (int r = 0; r < R; ++r) {
      int32_t bytes;
      std::memcpy(&bytes, x + r * x_stride + i, 4);
      const Four four(bytes);
      UNROLL for (int v = 0; v < kVectors; ++v)
        sums[r][v] = multiply_add(sums[r][v], four, panel + i * kPanel + v * 4 * kLanes);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    int32_t whole[kPanel];
    float row[kPanel];
    UNROLL for (int v = 0; v < kVectors; ++v) store(whole + v * kLanes, sums[r][v]);
    for (int c = 0; c < kPanel; ++c) row[c] = float(whole[c]) * (x_scales[r] * scales[c]) + bias[c];
    activate(activation, row);
    std::copy_n(row, columns, y + r * y_stride);
  }
}

// Calls `run(std::integral_constant<int, rows>)`, for rows up to kRows.
template <int R = kRows, class Run>
void with_rows(Index rows, Run run) {
  if (rows == R) return run(std::integral_constant<int, R>{});
  if constexpr (R > 1) with_rows<R - 1>(rows, run);
}

// The input of products: rows of floats and, for int8, the same rows in 8 bits with a scale each.
class Rows {
 public:
  Rows(Index rows, Index width, bool int8)
      : width_(width), stride_((width + 3) / 4 * 4), int8_(int8), values_(buffer(rows * width)),
        bytes_(int8 ? rows * stride_ : 0, kOffset), scales_(int8 ? rows : 0) {}

  float* row(Index r) { return &values_[r * width_]; }
  const float* row(Index r) const { return &values_[r * width_]; }
  const uint8_t* bytes(Index r) const { return &bytes_[r * stride_]; }
  const float* scales(Index r) const { return &scales_[r]; }
  Index stride() const { return stride_; }
  bool int8() const { return int8_; }

  // To be called after a row has been written.
  void round(Index r) {
    if (!int8_) return;
    const float* x = row(r);
    float largest = 1e-12f;
#pragma omp simd reduction(max : largest)
    for (Index i = 0; i < width_; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    scales_[r] = largest / 127.0f;
    const float factor = 127.0f / largest;
    uint8_t* to = &bytes_[r * stride_];
#pragma omp simd
    for (Index i = 0; i < width_; ++i) {
      const float shifted = x[i] * factor + 128.5f;
      // NaN (from weights that contain NaN or inf) cannot be converted to an integer.
      to[i] = uint8_t(int32_t(shifted == shifted ? shifted : 128.5f) - 128 + kOffset);
    }
  }

 private:
  Index width_, stride_;
  bool int8_;
  Buffer values_;
  std::vector<uint8_t> bytes_;
  std::vector<float> scales_;
};

// y = activation(x W^T + b).
class Linear {
 public:
  // weight: [out, in]. It is stored in panels, [out / kPanel, in, kPanel], as `block` reads it. In int8, four inputs of
  // an output are adjacent.
  Linear(const float* weight, const float* bias, Index out, Index in, Activation activation, bool int8)
      : out_(out), in_(int8 ? (in + 3) / 4 * 4 : in), panels_((out + kPanel - 1) / kPanel),
        activation_(activation), int8_(int8), bias_(zeros<float>(panels_ * kPanel)) {
    const Index columns = panels_ * kPanel;
    std::copy(bias, bias + out, &bias_[0]);
    if (int8) {
      bytes_ = zeros<int8_t>(columns * in_);
      scales_ = zeros<float>(columns);
      offsets_ = zeros<int32_t>(columns);
    } else {
      weight_ = zeros<float>(columns * in_);
    }
    for (Index o = 0; o < out; ++o) {
      const float* row = weight + o * in;
      const Index panel = o / kPanel * in_ * kPanel, column = o % kPanel;
      if (!int8) {
        for (Index i = 0; i < in; ++i) weight_[panel + i * kPanel + column] = row[i];
        continue;
      }
      float largest = 1e-12f;
      for (Index i = 0; i < in; ++i) largest = std::max(largest, std::fabs(row[i]));
      scales_[o] = largest / 127.0f;
      for (Index i = 0; i < in; ++i) {
        const int8_t rounded = int8_t(std::lrint(row[i] / scales_[o]));
        bytes_[panel + i / 4 * 4 * kPanel + column * 4 + i % 4] = rounded;
        offsets_[o] -= kOffset * rounded;
      }
    }
  }

  // x: [rows, in] -> y: [rows, out].
  void operator()(const Team& team, const Rows& x, Index rows, float* y) const {
    constexpr Index kGroup = 8 * kRows;  // rows of a piece of work
    const Index groups = (rows + kGroup - 1) / kGroup;
    const auto [first, last] = team.part(panels_ * groups);
    for (Index piece = first; piece < last; ++piece) {
      const Index panel = piece / groups, begin = piece % groups * kGroup, end = std::min(rows, begin + kGroup);
      const Index column = panel * kPanel, columns = std::min<Index>(kPanel, out_ - column);
      for (Index row = begin; row < end; row += kRows) {
        with_rows(std::min<Index>(kRows, end - row), [&](auto count) {
          float* to = y + row * out_ + column;
          if (int8_)
            return block<count>(x.bytes(row), x.stride(), x.scales(row), in_, &bytes_[column * in_], &offsets_[column],
                                &scales_[column], &bias_[column], activation_, to, out_, columns);
          block<count>(x.row(row), in_, in_, &weight_[column * in_], kPanel, &bias_[column], activation_, to, out_,
                       columns);
        });
      }
    }
  }

 private:
  Index out_, in_, panels_;
  Activation activation_;
  bool int8_;
  Buffer weight_, bias_, scales_;
  Array<int8_t> bytes_;
  Array<int32_t> offsets_;
};

class Norm {
 public:
  Norm() = default;  // the identity
  Norm(const float* weight, const float* bias, Index size, float eps)
      : weight_(weight, weight + size), bias_(bias, bias + size), eps_(eps) {}

  // Normalises one row.
  void operator()(const float* x, Index size, float* y) const {
    if (weight_.empty()) {
      std::copy(x, x + size, y);
      return;
    }
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < size; ++i) sum += x[i];
    const float mean = sum / size;
#pragma omp simd reduction(+ : squares)
    for (Index i = 0; i < size; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(squares / size + eps_);
    for (Index i = 0; i < size; ++i) y[i] = (x[i] - mean) * scale * weight_[i] + bias_[i];
  }

 private:
  std::vector<float> weight_, bias_;
  float eps_ = 0.0f;
};

// ---- Attention -----------------------------------------------------------------------------------------------------

// The attention's weights from its scores, in place: softmax over n.
void softmax(float* scores, Index n) {
  const float largest = maximum(scores, n);
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (Index t = 0; t < n; ++t) sum += scores[t] = exponential(scores[t] - largest);
#pragma omp simd
  for (Index t = 0; t < n; ++t) scores[t] /= sum;
}

// softmax(q K^T) V of one head and query (Vaswani et al., 2017, equation 1). 1 / sqrt(d_k) is part of the query.
// key(t) points to the t-th key, whose value is `to_value` floats after it; `weights` has room for n.
template <class Key>
void attend(const float* query, Index n, Key key, Index d_k, Index d_v, Index to_value, float* weights,
            float* context) {
  for (Index t = 0; t < n; ++t) {
    const float* k = key(t);
    float score = 0.0f;
#pragma omp simd reduction(+ : score)
    for (Index i = 0; i < d_k; ++i) score += query[i] * k[i];
    weights[t] = score;
  }
  softmax(weights, n);
  std::fill(context, context + d_v, 0.0f);
  for (Index t = 0; t < n; ++t) {
    const float* value = key(t) + to_value;
#pragma omp simd
    for (Index i = 0; i < d_v; ++i) context[i] += weights[t] * value[i];
  }
}

struct Heads {
  Index count, d_k, d_v;

  Index keys() const { return count * d_k; }
  Index values() const { return count * d_v; }
  Index both() const { return keys() + values(); }  // a row of a cache: the keys of all heads, then their values
};

// Rows that attend to the same sentence.
struct Group {
  Index first_row, rows, sentence;
};

// Splits `rows` rows, starting at the first one, into groups of at most kRows.
void add_groups(std::vector<Group>& groups, Index first_row, Index rows, Index sentence) {
  for (Index row = 0; row < rows; row += kRows)
    groups.push_back({first_row + row, std::min<Index>(kRows, rows - row), sentence});
}

// Keys and values of whole sentences, to which groups of rows attend. The keys are stored as panels of kPanel tokens,
// so that queries times keys, and weights times values, are products like all others.
class Source {
 public:
  Source(const Heads& heads, const Index* starts, Index sentences) : heads_(heads), starts_(starts) {
    first_panel_.push_back(0);
    for (Index s = 0; s < sentences; ++s) first_panel_.push_back(first_panel_[s] + (length(s) + kPanel - 1) / kPanel);
    for (Index s = 0; s < sentences; ++s) sentence_of_token_.insert(sentence_of_token_.end(), length(s), s);
    panels_ = buffer(first_panel_.back() * kPanel * heads.keys());
  }

  Index tokens() const { return sentence_of_token_.size(); }
  Index sentence(Index token) const { return sentence_of_token_[token]; }
  Index position(Index token) const { return token - starts_[sentence(token)]; }
  Index length(Index s) const { return starts_[s + 1] - starts_[s]; }

  // states: [tokens, stride], whose first `Heads::both` numbers are used. Values are not copied, and products read up
  // to kPanel numbers beyond them.
  void read(const Team& team, const float* states, Index stride) {
    if (team.rank == 0) {
      values_ = states + heads_.keys();
      stride_ = stride;
    }
    const auto [first, last] = team.part(tokens());
    for (Index token = first; token < last; ++token)
      for (Index head = 0; head < heads_.count; ++head) {
        const float* key = states + token * stride + head * heads_.d_k;
        float* to = panel(sentence(token), head, position(token) / kPanel) + position(token) % kPanel;
        for (Index i = 0; i < heads_.d_k; ++i) to[i * kPanel] = key[i];
      }
  }

  // One head of a group. query: [rows, keys()] -> context: [rows, values()]; weights: room for kRows * room numbers.
  void attend(const Group& group, Index head, const float* query, float* weights, Index room, float* context) const {
    const Index n = length(group.sentence);
    with_rows(group.rows, [&](auto rows) {
      for (Index t = 0; t < n; t += kPanel)
        block<rows>(query + head * heads_.d_k, heads_.keys(), heads_.d_k, panel(group.sentence, head, t / kPanel),
                    kPanel, nullptr, Activation::kNone, weights + t, room, std::min<Index>(kPanel, n - t));
      for (Index r = 0; r < rows; ++r) softmax(weights + r * room, n);
      const float* values = values_ + starts_[group.sentence] * stride_ + head * heads_.d_v;
      for (Index i = 0; i < heads_.d_v; i += kPanel)
        block<rows>(weights, room, n, values + i, stride_, nullptr, Activation::kNone,
                    context + head * heads_.d_v + i, heads_.values(), std::min<Index>(kPanel, heads_.d_v - i));
    });
  }

 private:
  float* panel(Index s, Index head, Index i) const {
    return &panels_[((first_panel_[s] + i) * heads_.count + head) * heads_.d_k * kPanel];
  }

  Heads heads_;
  const Index* starts_;
  std::vector<Index> first_panel_, sentence_of_token_;
  Buffer panels_;
  const float* values_ = nullptr;
  Index stride_ = 0;
};

// ---- The network ---------------------------------------------------------------------------------------------------

// Must match `Sizes` in engine_program.py.
struct Sizes {
  Index d_model, source_vocabulary, vocabulary;
  Index encoder_layers, encoder_heads, encoder_ffn, decoder_layers, decoder_heads, decoder_ffn;
  Index encoder_d_k, encoder_d_v, decoder_d_k, decoder_d_v;
  Index normalize_before;
  Index int8;  // whether products with weights are computed in 8 bits
  Activation activation;
  float eps, encoder_scale, decoder_scale;

  // Throws std::length_error.
  void check() const {
    for (Index size : {d_model, source_vocabulary, vocabulary, encoder_layers, encoder_heads, encoder_ffn,
                       decoder_layers, decoder_heads, decoder_ffn, encoder_d_k, encoder_d_v, decoder_d_k, decoder_d_v})
      if (size < 1) throw std::length_error("a size of the network is " + std::to_string(size));
  }
};

// A matrix or vector of weights. Must match `Weight` in engine_program.py.
struct Weight {
  const float* numbers;
  Index count;
};

// Takes the weights in the order in which Python lists them.
struct Weights {
  const Weight *next, *end;
  Sizes sizes;

  const float* take(Index count) {
    if (next == end || next->count != count)
      throw std::length_error("weight " + std::to_string(end - next) + " from the end has " +
                              (next == end ? "no" : std::to_string(next->count)) + " numbers, and the sizes ask for " +
                              std::to_string(count));
    return (next++)->numbers;
  }
  Linear linear(Index out, Index in, Activation activation = Activation::kNone) {
    const float* weight = take(out * in);
    return Linear(weight, take(out), out, in, activation, sizes.int8);
  }
  // A missing norm (the identity) has null entries in the list.
  Norm norm() {
    const bool missing = next != end && !next->numbers;
    const float* weight = take(missing ? 0 : sizes.d_model);
    const float* bias = take(missing ? 0 : sizes.d_model);
    return missing ? Norm() : Norm(weight, bias, sizes.d_model, sizes.eps);
  }
};

struct Layer {
  Linear query, key_value, out;
  Norm self_norm;
  Linear fc1, fc2;
  Norm final_norm;

  Layer(Weights& weights, const Heads& heads, Index d, Index ffn)
      : query(weights.linear(heads.keys(), d)),
        key_value(weights.linear(heads.both(), d)),
        out(weights.linear(d, heads.values())),
        self_norm(weights.norm()),
        fc1(weights.linear(ffn, d, weights.sizes.activation)),
        fc2(weights.linear(d, ffn)),
        final_norm(weights.norm()) {}
};

struct DecoderLayer : Layer {
  Linear cross_query, cross_out;
  Norm cross_norm;

  DecoderLayer(Weights& weights, const Heads& heads, Index d, Index ffn)
      : Layer(weights, heads, d, ffn),
        cross_query(weights.linear(heads.keys(), d)),
        cross_out(weights.linear(d, heads.values())),
        cross_norm(weights.norm()) {}
};

struct Network {
  Sizes sizes;
  Heads encoder_heads, decoder_heads;
  std::vector<Layer> encoder;
  Norm encoder_norm;
  std::vector<DecoderLayer> decoder;
  Norm decoder_norm;
  std::unique_ptr<Linear> read_source;  // the source's keys and values for all decoder layers
  std::unique_ptr<Linear> project;
  const float *encoder_embedding, *decoder_embedding;  // [V, d], not copied

  Network(const Sizes& given, const Weight* first, Index count)
      : sizes(given),
        encoder_heads{given.encoder_heads, given.encoder_d_k, given.encoder_d_v},
        decoder_heads{given.decoder_heads, given.decoder_d_k, given.decoder_d_v} {
    sizes.check();
    Weights weights{first, first + count, sizes};
    for (Index i = 0; i < sizes.encoder_layers; ++i)
      encoder.emplace_back(weights, encoder_heads, sizes.d_model, sizes.encoder_ffn);
    encoder_norm = weights.norm();
    for (Index i = 0; i < sizes.decoder_layers; ++i)
      decoder.emplace_back(weights, decoder_heads, sizes.d_model, sizes.decoder_ffn);
    decoder_norm = weights.norm();
    const Index read = sizes.decoder_layers * decoder_heads.both();
    read_source = std::make_unique<Linear>(weights.linear(read, sizes.d_model));
    project = std::make_unique<Linear>(weights.linear(sizes.vocabulary, sizes.d_model));
    encoder_embedding = weights.take(sizes.source_vocabulary * sizes.d_model);
    decoder_embedding = weights.take(sizes.vocabulary * sizes.d_model);
    if (weights.next != weights.end) throw std::length_error("there are more weights than the sizes ask for");
  }
};

// Runs some rows through the layers, and holds their states.
class States {
 public:
  States(const Sizes& sizes, const Heads& heads, Index ffn, Index rows, Index longest, Index threads)
      : d_(sizes.d_model), pre_norm_(sizes.normalize_before), heads_(heads), longest_(longest),
        x_(rows, d_, sizes.int8), normed_(rows, d_, sizes.int8), context_(rows, heads.values(), sizes.int8),
        hidden_(rows, ffn, sizes.int8), y_(buffer(rows * d_)), query_(buffer(rows * heads.keys())),
        weights_(buffer(threads * kRows * longest)) {}

  // Embedding and position of one row.
  void embed(Index r, const float* embedding, float scale, const float* position) {
#pragma omp simd
    for (Index i = 0; i < d_; ++i) x_.row(r)[i] = embedding[i] * scale + position[i];
    x_.round(r);
  }

  // Row r attends to `length` keys; key(r, t) points to the t-th key of the first head. Its own key goes into `cache`.
  template <class Key>
  void self_attention(const Team& team, Index rows, const Layer& layer, float* cache, Index length, Key key) {
    residual(team, rows, layer.self_norm, [&](const Rows& x) {
      layer.query(team, x, rows, query_.get());
      layer.key_value(team, x, rows, cache);
      team.wait();
      const auto [first, last] = team.part(rows * heads_.count);
      for (Index piece = first; piece < last; ++piece) {
        const Index r = piece / heads_.count, head = piece % heads_.count;
        attend(
            &query_[r * heads_.keys() + head * heads_.d_k], length,
            [&](Index t) { return key(r, t) + head * heads_.d_k; }, heads_.d_k, heads_.d_v,
            heads_.keys() + head * (heads_.d_v - heads_.d_k), &weights_[team.rank * kRows * longest_],
            context_.row(r) + head * heads_.d_v);
      }
      finish_attention(team, rows, layer.out);
    });
  }

  // All tokens of a sentence attend to each other.
  void self_attention(const Team& team, Index rows, const Layer& layer, float* cache, const std::vector<Group>& groups,
                      Source& source) {
    residual(team, rows, layer.self_norm, [&](const Rows& x) {
      layer.query(team, x, rows, query_.get());
      layer.key_value(team, x, rows, cache);
      team.wait();
      source.read(team, cache, heads_.both());
      team.wait();
      attend_in_groups(team, groups, source);
      finish_attention(team, rows, layer.out);
    });
  }

  void cross_attention(const Team& team, Index rows, const DecoderLayer& layer, const std::vector<Group>& groups,
                       const Source& source) {
    residual(team, rows, layer.cross_norm, [&](const Rows& x) {
      layer.cross_query(team, x, rows, query_.get());
      team.wait();
      attend_in_groups(team, groups, source);
      finish_attention(team, rows, layer.cross_out);
    });
  }

  void feed_forward(const Team& team, Index rows, const Layer& layer) {
    residual(team, rows, layer.final_norm, [&](const Rows& x) {
      layer.fc1(team, x, rows, hidden_.row(0));
      team.wait();
      round(team, rows, hidden_);
      layer.fc2(team, hidden_, rows, y_.get());
    });
  }

  // The states after a stack's last norm.
  const Rows& normed(const Team& team, Index rows, const Norm& norm) {
    const auto [first, last] = team.part(rows);
    for (Index r = first; r < last; ++r) {
      norm(x_.row(r), d_, normed_.row(r));
      normed_.round(r);
    }
    team.wait();
    return normed_;
  }

 private:
  // Norm(x + Sublayer(x)) (section 3.1) or, in pre-norm, x + Sublayer(Norm(x)). The sublayer's result is in y_.
  template <class Sublayer>
  void residual(const Team& team, Index rows, const Norm& norm, Sublayer sublayer) {
    sublayer(pre_norm_ ? normed(team, rows, norm) : x_);
    team.wait();
    const auto [first, last] = team.part(rows);
    for (Index r = first; r < last; ++r) {
      float* x = x_.row(r);
#pragma omp simd
      for (Index i = 0; i < d_; ++i) x[i] += y_[r * d_ + i];
      if (pre_norm_) continue;
      norm(x, d_, x);
      x_.round(r);
    }
    team.wait();
  }

  void attend_in_groups(const Team& team, const std::vector<Group>& groups, const Source& source) {
    const auto [first, last] = team.part(groups.size() * heads_.count);
    for (Index piece = first; piece < last; ++piece) {
      const Group& group = groups[piece / heads_.count];
      source.attend(group, piece % heads_.count, &query_[group.first_row * heads_.keys()],
                    &weights_[team.rank * kRows * longest_], longest_, context_.row(group.first_row));
    }
  }

  void finish_attention(const Team& team, Index rows, const Linear& out) {
    team.wait();
    round(team, rows, context_);
    out(team, context_, rows, y_.get());
  }

  void round(const Team& team, Index rows, Rows& states) {
    if (!states.int8()) return;
    const auto [first, last] = team.part(rows);
    for (Index r = first; r < last; ++r) states.round(r);
    team.wait();
  }

  Index d_;
  bool pre_norm_;
  Heads heads_;
  Index longest_;
  Rows x_, normed_, context_, hidden_;
  Buffer y_, query_, weights_;
};

// ---- The searches --------------------------------------------------------------------------------------------------

// The input and output of a search. Must match `Job` in engine_program.py.
struct Job {
  Index sentences, threads;
  const Index* source;         // the ids of all source tokens, sentence after sentence, without padding
  const Index* source_starts;  // [sentences + 1]: where each sentence begins in `source`
  const float *encoder_positions, *decoder_positions;  // [as many as there are, d]
  Index encoder_position_count, decoder_position_count;
  const Index* prefix;                          // [sentences, prefix_length]
  Index prefix_length, max_length, min_length;  // with the prefix; nothing ends before min_length
  const Index* eos;
  Index eos_count;
  Index beams;  // 0: greedy search
  Index early_stopping;  // 0: False; 1: True; 2: "never", where longer outputs are favoured
  const float* length_penalties;  // [max_length]: the divisor of the log-probability of n new tokens
  Index returned;                 // hypotheses returned for each sentence
  Index* sequences;               // [sentences, returned, max_length], filled with padding
  float* scores;                  // [sentences, returned]
  Index* lengths;                 // [sentences, returned]
  int32_t* lineage;               // [sentences, returned, max_length - prefix_length], filled with -1
  // Python's PyEval_SaveThread, PyEval_RestoreThread and PyErr_CheckSignals, or null. The first two let other Python
  // threads run during the search; the third is called regularly, and ends the search after Ctrl-C.
  void* (*release_interpreter)();
  void (*take_interpreter)(void*);
  int (*check_signals)();

  // Throws std::length_error or std::out_of_range if the search would access memory outside its buffers.
  void check(const Sizes& sizes) const {
    const auto demand = [](bool holds, const char* what) {
      if (!holds) throw std::length_error(what);
    };
    const auto within = [](const char* name, const Index* ids, Index count, Index vocabulary) {
      for (Index i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= vocabulary)
          throw std::out_of_range(std::string(name) + " holds the id " + std::to_string(ids[i]) +
                                  "; ids go from 0 to " + std::to_string(vocabulary - 1));
    };
    demand(sentences > 0, "there are no sentences");
    demand(threads > 0, "there are no threads");
    demand(eos_count >= 0, "there are fewer than no ids that end a sentence");
    // Row numbers have 32 bits.
    demand(beams >= 0 && beams <= std::numeric_limits<int32_t>::max() / sentences, "there are too many beams");
    demand(prefix_length > 0 && prefix_length < max_length, "the prefix leaves no room below max_length");
    demand(returned > 0 && returned <= std::max<Index>(1, beams), "more outputs are asked for than there are beams");
    demand(source_starts[0] == 0, "the source does not begin at 0");
    for (Index s = 0; s < sentences; ++s) {
      const Index length = source_starts[s + 1] - source_starts[s];
      demand(length >= 0, "a sentence ends before it begins");
      demand(length <= encoder_position_count, "the source is longer than its positions");
    }
    demand(max_length <= decoder_position_count, "max_length is more than there are positions");
    within("input_ids", source, source_starts[sentences], sizes.source_vocabulary);
    within("decoder_input_ids", prefix, sentences * prefix_length, sizes.vocabulary);
    within("eos_token_id", eos, eos_count, sizes.vocabulary);
  }
};

struct Interrupted {};

// The caller's Python interpreter, released for the life of the object.
class ReleasedInterpreter {
 public:
  explicit ReleasedInterpreter(const Job& job)
      : job_(job), state_(job.release_interpreter ? job.release_interpreter() : nullptr) {}
  ~ReleasedInterpreter() {
    if (job_.take_interpreter) job_.take_interpreter(state_);
  }

 private:
  const Job& job_;
  void* state_;
};

struct Candidate {
  float score;
  Index beam, token;
};

// Inserts a candidate into the sorted best and drops the last. Of equals, the earlier one stays in front.
inline void insert(std::vector<Candidate>& best, const Candidate& candidate) {
  Index place = best.size() - 1;
  if (!(candidate.score > best[place].score)) return;
  for (; place > 0 && candidate.score > best[place - 1].score; --place) best[place] = best[place - 1];
  best[place] = candidate;
}

// A row of a step: its parent and its token.
struct Node {
  Index parent;  // row of the step before
  Index token;
  int32_t beam;  // the parent among all beams of the batch, as transformers counts them
};

struct Finished {
  float score;
  bool ended;      // false: the place is free
  Node node;       // its last token
  Index position;  // of that token
};

struct Sentence {
  Index number, first_row;
  std::vector<Candidate> running;  // W, the best first
  std::vector<Finished> finished;  // likewise
  bool improvable = true, done = false;
};

class Search {
 public:
  Search(const Network& network, const Job& job)
      : network_(network), job_(job), width_(std::max<Index>(1, job.beams)),
        k_(job.beams ? std::max<Index>(2, 1 + job.eos_count) * width_ : 1),
        source_(network.encoder_heads, job.source_starts, job.sentences) {
    for (const DecoderLayer& layer [[maybe_unused]] : network.decoder)
      cross_.emplace_back(network.decoder_heads, job.source_starts, job.sentences);
    sentences_.resize(job.sentences);
    for (Index s = 0; s < job.sentences; ++s) {
      Sentence& sentence = sentences_[s];
      sentence.number = sentence.first_row = s;
      // All beams are equal at first, so only the first one is continued.
      sentence.running.assign(width_, Candidate{kNever, 0, 0});
      sentence.running[0].score = 0.0f;
      const Index last = job.prefix_length - 1;
      sentence.finished.assign(width_, {kNever, false, {s, job.prefix[s * job.prefix_length + last], -1}, last});
      active_.push_back(s);
      longest_ = std::max(longest_, source_.length(s));
      add_groups(groups_of_source_, job.source_starts[s], source_.length(s), s);
    }
    const Index rows = job.sentences * width_;
    steps_.resize(job.max_length + 1);
    for (Index s = 0; s < job.sentences; ++s) {
      steps_[0].nodes.push_back({s, job.prefix[s * job.prefix_length], -1});
      groups_.push_back({s, 1, s});
    }
    ancestors_.resize(rows * job.max_length);
    next_ancestors_.resize(rows * job.max_length);
    best_.resize(rows, std::vector<Candidate>(std::min(k_, network.sizes.vocabulary)));
    logits_ = buffer(rows * network.sizes.vocabulary);
    const Index tokens = source_.tokens();
    encoder_ = std::make_unique<States>(network.sizes, network.encoder_heads, network.sizes.encoder_ffn, tokens,
                                        longest_, job.threads);
    states_of_source_ = buffer(tokens * network.encoder_heads.both() + kPanel);
    cross_states_ = buffer(tokens * network.decoder.size() * network.decoder_heads.both() + kPanel);
  }

  bool done() const { return active_.empty(); }

  // Runs for about as long as a piece of work should last. All threads stop at the same point.
  void run(const Team& team) {
    const auto end = Clock::now() + Crew::kPiece;
    if (!decoder_) encode(team);
    do {
      const bool in_prefix = position_ + 1 < job_.prefix_length;
      decode(team);
      if (in_prefix) {
        if (team.rank == 0) {
          read_prefix();
          paused_ = Clock::now() > end;
        }
        team.wait();
        continue;
      }
      const Index vocabulary = network_.sizes.vocabulary, rows = steps_[position_].nodes.size();
      (*network_.project)(team, decoder_->normed(team, rows, network_.decoder_norm), rows, logits_.get());
      team.wait();
      const auto [first, last] = team.part(rows);
      for (Index r = first; r < last; ++r) score(&logits_[r * vocabulary], best_[r]);
      team.wait();
      const auto [first_sentence, last_sentence] = team.part(active_.size());
      for (Index s = first_sentence; s < last_sentence; ++s) {
        job_.beams ? grow(sentences_[active_[s]]) : choose(sentences_[active_[s]]);
      }
      team.wait();
      if (team.rank == 0) {
        advance();
        paused_ = Clock::now() > end;
      }
      team.wait();
    } while (!paused_ && !done());
    if (!done()) return;
    const auto [first, last] = team.part(job_.sentences);
    for (Index s = first; s < last; ++s) tell(sentences_[s]);
  }

 private:
  // A position of the target: the rows computed there, and their keys and values, [layers, rows, both].
  struct Step {
    std::vector<Node> nodes;
    Buffer cache;
    Index rows = 0;
  };

  // Encodes the source tokens of all sentences as rows, then computes their keys and values for the decoder's layers.
  void encode(const Team& team) {
    const Sizes& sizes = network_.sizes;
    const Index d = sizes.d_model, tokens = source_.tokens(), read = network_.decoder_heads.both();
    const Index layers = network_.decoder.size();
    const auto [first, last] = team.part(tokens);
    for (Index r = first; r < last; ++r)
      encoder_->embed(r, network_.encoder_embedding + job_.source[r] * d, sizes.encoder_scale,
                      job_.encoder_positions + source_.position(r) * d);
    team.wait();
    for (const Layer& layer : network_.encoder) {
      encoder_->self_attention(team, tokens, layer, states_of_source_.get(), groups_of_source_, source_);
      encoder_->feed_forward(team, tokens, layer);
    }
    (*network_.read_source)(team, encoder_->normed(team, tokens, network_.encoder_norm), tokens, cross_states_.get());
    team.wait();
    for (Index l = 0; l < layers; ++l) cross_[l].read(team, &cross_states_[l * read], layers * read);
    team.wait();
    if (team.rank == 0) {
      encoder_.reset();
      decoder_ = std::make_unique<States>(sizes, network_.decoder_heads, sizes.decoder_ffn, job_.sentences * width_,
                                          std::max(longest_, job_.max_length), job_.threads);
    }
    team.wait();
  }

  // Runs the tokens at `position_` through the decoder's layers.
  void decode(const Team& team) {
    Step& step = steps_[position_];
    const Index d = network_.sizes.d_model, rows = step.nodes.size(), both = network_.decoder_heads.both();
    const Index layers = network_.decoder.size();
    if (team.rank == 0) {
      step.rows = rows;
      step.cache = buffer(layers * rows * both);
    }
    const auto [first, last] = team.part(rows);
    for (Index r = first; r < last; ++r)
      decoder_->embed(r, network_.decoder_embedding + step.nodes[r].token * d, network_.sizes.decoder_scale,
                      job_.decoder_positions + position_ * d);
    team.wait();
    for (Index l = 0; l < layers; ++l) {
      const DecoderLayer& layer = network_.decoder[l];
      decoder_->self_attention(team, rows, layer, &step.cache[l * rows * both], position_ + 1, [&](Index r, Index t) {
        const Index row = t == position_ ? r : ancestors_[r * job_.max_length + t];
        return &steps_[t].cache[(l * steps_[t].rows + row) * both];
      });
      decoder_->cross_attention(team, rows, layer, groups_, cross_[l]);
      decoder_->feed_forward(team, rows, layer);
    }
  }

  // Finds the best continuations of one row, by log-probability (in greedy search by logit).
  void score(float* logits, std::vector<Candidate>& best) const {
    const Index vocabulary = network_.sizes.vocabulary;
    float subtract = 0.0f;
    if (job_.beams) {
      const float largest = maximum(logits, vocabulary);
      subtract = largest + std::log(sum_of_exponentials(logits, vocabulary, largest));
    }
    if (position_ + 1 < job_.min_length)
      for (Index e = 0; e < job_.eos_count; ++e) logits[job_.eos[e]] = -kInfinity;
    best.assign(best.size(), Candidate{-kInfinity, 0, 0});
    constexpr Index kChunk = 64;
    for (Index begin = 0; begin < vocabulary; begin += kChunk) {
      const Index end = std::min(vocabulary, begin + kChunk);
      if (!(maximum(logits + begin, end - begin) > best.back().score)) continue;
      for (Index token = begin; token < end; ++token) insert(best, {logits[token], 0, token});
    }
    for (Candidate& candidate : best) candidate.score -= subtract;
  }

  bool is_eos(Index token) const {
    const Index* end = job_.eos + job_.eos_count;
    return std::find(job_.eos, end, token) != end;
  }

  bool is_last() const { return position_ + 2 >= job_.max_length; }

  Node continued(const Sentence& sentence, const Candidate& candidate) const {
    const Index parent = sentence.first_row + (is_first() ? 0 : candidate.beam);
    return {parent, candidate.token, int32_t(sentence.number * width_ + candidate.beam)};
  }

  // Before the first choice each sentence has one row.
  bool is_first() const { return position_ + 1 == job_.prefix_length; }

  // Greedy search.
  void choose(Sentence& sentence) const {
    sentence.running[0] = best_[sentence.first_row][0];
    sentence.done = is_last() || is_eos(sentence.running[0].token);
    if (sentence.done) sentence.finished[0] = {0.0f, true, continued(sentence, sentence.running[0]), position_ + 1};
  }

  // Beam search for one sentence, as in `_Beams.grow`.
  void grow(Sentence& sentence) const {
    std::vector<Candidate> candidates(k_, Candidate{-kInfinity, 0, 0});
    for (Index beam = 0; beam < width_; ++beam)
      for (const Candidate& next : best_[sentence.first_row + (is_first() ? 0 : beam)])
        insert(candidates, {next.score + sentence.running[beam].score, beam, next.token});
    std::vector<char> ends(k_);
    for (Index k = 0; k < k_; ++k) ends[k] = is_last() || is_eos(candidates[k].token);

    std::vector<Candidate> running(width_, Candidate{-kInfinity, 0, 0});
    for (Index k = 0; k < k_; ++k) {
      Candidate candidate = candidates[k];
      candidate.score += ends[k] ? kNever : 0.0f;
      insert(running, candidate);
    }
    finish(sentence, candidates, ends);
    sentence.running = std::move(running);
    judge(sentence, std::all_of(ends.begin(), ends.end(), [](char end) { return end; }));
  }

  bool all_finished(const Sentence& sentence) const {
    return std::all_of(sentence.finished.begin(), sentence.finished.end(), [](const Finished& f) { return f.ended; });
  }

  // Moves candidates that end to the finished hypotheses if they are better than those. Candidates after the first W
  // only replace those that end. They cannot end themselves.
  void finish(Sentence& sentence, const std::vector<Candidate>& candidates, const std::vector<char>& ends) const {
    const bool closed = !sentence.improvable || (job_.early_stopping == 1 && all_finished(sentence));
    for (Index k = 0; k < width_; ++k) {
      if (!ends[k] || closed) continue;
      const float score = candidates[k].score / job_.length_penalties[position_ + 2 - job_.prefix_length];
      Index place = width_;
      while (place > 0 && score > sentence.finished[place - 1].score) --place;
      if (place == width_) continue;
      sentence.finished.pop_back();
      sentence.finished.insert(sentence.finished.begin() + place,
                               {score, true, continued(sentence, candidates[k]), position_ + 1});
    }
  }

  // Whether the running hypotheses can still beat the finished ones, as in `_Beams._judge`.
  void judge(Sentence& sentence, bool all_end) const {
    const bool full = all_finished(sentence);
    if (full) {
      const Index last = job_.early_stopping == 2 ? job_.max_length : position_ + 2;
      const Index length = last - job_.prefix_length;
      const float best = sentence.running[0].score / job_.length_penalties[length];
      sentence.improvable = sentence.improvable && best > sentence.finished.back().score;
    }
    sentence.done = !sentence.improvable || (full && job_.early_stopping == 1) || all_end;
  }

  void read_prefix() {
    ++position_;
    for (Index s = 0; s < job_.sentences; ++s) {
      steps_[position_].nodes.push_back({s, job_.prefix[s * job_.prefix_length + position_], -1});
      ancestors_[s * job_.max_length + position_ - 1] = s;
    }
  }

  // Makes the next position's rows: the running hypotheses of the sentences that are not done.
  void advance() {
    std::erase_if(active_, [&](Index s) { return sentences_[s].done; });
    std::vector<Node>& nodes = steps_[position_ + 1].nodes;
    groups_.clear();
    for (Index s : active_) {
      Sentence& sentence = sentences_[s];
      const Index first_row = nodes.size();
      for (const Candidate& candidate : sentence.running) {
        const Node node = continued(sentence, candidate);
        const int32_t* from = &ancestors_[node.parent * job_.max_length];
        int32_t* to = &next_ancestors_[nodes.size() * job_.max_length];
        std::copy(from, from + position_, to);
        to[position_] = node.parent;
        nodes.push_back(node);
      }
      sentence.first_row = first_row;
      add_groups(groups_, first_row, width_, s);
    }
    ancestors_.swap(next_ancestors_);
    ++position_;
    if (position_ >= kLag) forget(position_ - kLag);
  }

  // Drops the rows without a descendant from a cache. Beams share most of their history.
  void forget(Index position) {
    Step& step = steps_[position];
    const Index rows = steps_[position_].nodes.size(), both = network_.decoder_heads.both();
    const Index layers = network_.decoder.size();
    std::vector<int32_t> place(step.rows, -1);
    std::vector<Index> living;
    for (Index r = 0; r < rows; ++r) {
      int32_t& ancestor = ancestors_[r * job_.max_length + position];
      if (place[ancestor] < 0) {
        place[ancestor] = living.size();
        living.push_back(ancestor);
      }
      ancestor = place[ancestor];
    }
    Buffer kept = buffer(layers * living.size() * both);
    for (Index l = 0; l < layers; ++l)
      for (size_t i = 0; i < living.size(); ++i)
        std::copy_n(&step.cache[(l * step.rows + living[i]) * both], both, &kept[(l * living.size() + i) * both]);
    step.cache = std::move(kept);
    step.rows = living.size();
  }

  // Writes the best finished hypotheses.
  void tell(const Sentence& sentence) const {
    for (Index i = 0; i < job_.returned; ++i) {
      const Finished& finished = sentence.finished[i];
      const Index to = sentence.number * job_.returned + i;
      job_.scores[to] = finished.score;
      job_.lengths[to] = finished.position + 1;
      Node node = finished.node;
      for (Index position = finished.position; position >= 0; --position) {
        job_.sequences[to * job_.max_length + position] = node.token;
        const Index step = position - job_.prefix_length;
        if (step >= 0) job_.lineage[to * (job_.max_length - job_.prefix_length) + step] = node.beam;
        if (position > 0) node = steps_[position - 1].nodes[node.parent];
      }
    }
  }

  static constexpr Index kLag = 16;  // positions after which most rows that will be dropped have no descendant

  const Network& network_;
  const Job& job_;
  const Index width_, k_;
  Source source_;              // for the encoder's layers, one after another
  std::vector<Source> cross_;  // for each layer of the decoder
  Index longest_ = 0;          // source
  std::vector<Group> groups_of_source_, groups_;
  std::unique_ptr<States> encoder_, decoder_;
  Buffer states_of_source_, cross_states_, logits_;
  std::vector<Sentence> sentences_;
  std::vector<Index> active_;                        // sentences that are not done
  Index position_ = 0;                               // of the next tokens
  bool paused_ = false;
  std::vector<Step> steps_;
  std::vector<int32_t> ancestors_, next_ancestors_;  // [rows, max_length]: a row's own rows in the caches before
  std::vector<std::vector<Candidate>> best_;         // of each row
};

// ---- The interface for Python ---------------------------------------------------------------------------------------

// No exception leaves the program. The error message is kept for the calling thread.
enum Outcome : Index { kDone, kInterrupted, kNoMemory, kNoThread, kOutOfRange, kOther };
thread_local char message[256];

// Must not allocate, because that might fail too.
void keep(const std::exception& error) { std::strncpy(message, error.what(), sizeof(message) - 1); }

template <class Run>
Outcome outcome(Run run) {
  try {
    run();
    return kDone;
  } catch (const Interrupted&) {
    return kInterrupted;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const std::system_error& error) {
    keep(error);
    return kNoThread;
  } catch (const std::out_of_range& error) {
    keep(error);
    return kOutOfRange;
  } catch (const std::exception& error) {
    keep(error);
    return kOther;
  }
}

}  // namespace

extern "C" {

Index vt_create(const Sizes* sizes, const Weight* weights, Index count, void** network) {
  return outcome([&] { *network = new Network(*sizes, weights, count); });
}

void vt_destroy(void* network) { delete static_cast<Network*>(network); }

Index vt_search(const void* network, const Job* job) {
  return outcome([&] {
    const Network& searched = *static_cast<const Network*>(network);
    job->check(searched.sizes);
    Search search(searched, *job);
    Crew crew(job->threads);
    while (!search.done()) {
      {
        const ReleasedInterpreter released(*job);
        crew.together([&](const Team& team) { search.run(team); });
      }
      if (job->check_signals && job->check_signals()) throw Interrupted();
    }
  });
}

const char* vt_message() { return message; }

// The size of each structure and the offsets of its fields. Python compares them with its own.
#define FIELD(name) offsetof(Structure, name)
const Index* vt_layout(Index which) {
  if (which == 0) {
    using Structure = Sizes;
    static const Index layout[] = {
        sizeof(Structure), FIELD(d_model), FIELD(source_vocabulary), FIELD(vocabulary), FIELD(encoder_layers),
        FIELD(encoder_heads), FIELD(encoder_ffn), FIELD(decoder_layers), FIELD(decoder_heads), FIELD(decoder_ffn),
        FIELD(encoder_d_k), FIELD(encoder_d_v), FIELD(decoder_d_k), FIELD(decoder_d_v), FIELD(normalize_before),
        FIELD(int8), FIELD(activation), FIELD(eps), FIELD(encoder_scale), FIELD(decoder_scale)};
    return layout;
  }
  using Structure = Job;
  static const Index layout[] = {
      sizeof(Structure), FIELD(sentences), FIELD(threads), FIELD(source), FIELD(source_starts),
      FIELD(encoder_positions), FIELD(decoder_positions), FIELD(encoder_position_count), FIELD(decoder_position_count),
      FIELD(prefix), FIELD(prefix_length), FIELD(max_length), FIELD(min_length), FIELD(eos), FIELD(eos_count),
      FIELD(beams), FIELD(early_stopping), FIELD(length_penalties), FIELD(returned), FIELD(sequences), FIELD(scores),
      FIELD(lengths), FIELD(lineage), FIELD(release_interpreter), FIELD(take_interpreter), FIELD(check_signals)};
  return layout;
}
#undef FIELD

}
