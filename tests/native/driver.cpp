// Runs the compiled program without Python (tests/native/run.py builds and calls it).
//
//   driver search IN OUT        runs the searches of a file that run.py has written, and writes what they find
//   driver fuzz SECONDS SEED    random networks and searches, from that seed on, until the time is over
//
// The fuzz has no second program to compare with. It asks that a sentence's output depends neither on its neighbours nor
// on the number of threads nor on other searches, bit for bit, and that all that goes wrong ends as an outcome. The
// sanitizers ask the rest. The linker's --wrap leads allocations and the start of threads to the functions below.

#include "engine_compiled.cpp"

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <random>

#include <unistd.h>

// ---- Failures on demand --------------------------------------------------------------------------------------------

namespace {

// Allocations until one fails, and from then on every so many-th. Negative: none fails.
std::atomic<long> allocations_left{-1}, allocations_counted{0}, failures_counted{0};
std::atomic<bool> threads_fail{false};
long repeat_failure_after = 0;

bool allocation_fails() {
  allocations_counted.fetch_add(1, std::memory_order_relaxed);
  if (allocations_left.load(std::memory_order_relaxed) < 0) return false;
  if (allocations_left.fetch_sub(1, std::memory_order_relaxed) != 0) return false;
  allocations_left.store(repeat_failure_after, std::memory_order_relaxed);
  failures_counted.fetch_add(1, std::memory_order_relaxed);
  return true;
}

}  // namespace

// Not inlined: GCC would warn that what `new` gave is given to `free`.
__attribute__((noinline)) void* operator new(size_t size) {
  void* memory = allocation_fails() ? nullptr : std::malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}
__attribute__((noinline)) void operator delete(void* memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void* memory, size_t) noexcept { std::free(memory); }

extern "C" {

void* __real_aligned_alloc(size_t alignment, size_t size);
void* __wrap_aligned_alloc(size_t alignment, size_t size) {
  return allocation_fails() ? nullptr : __real_aligned_alloc(alignment, size);
}

// std::thread::_M_start_thread
#define START(prefix) prefix##_ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE
void START(__real_)(void* thread, void* state, void (*depend)());
void START(__wrap_)(void* thread, void* state, void (*depend)()) {
  if (threads_fail && std::rand() % 2) throw std::system_error(EAGAIN, std::generic_category());
  START(__real_)(thread, state, depend);
}
#undef START

void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

}

namespace {

// ---- Networks and searches that own their numbers ------------------------------------------------------------------

struct OwnedNetwork {
  Sizes sizes{};
  std::vector<std::vector<float>> numbers;  // empty: a missing norm
  void* handle = nullptr;

  OwnedNetwork() = default;
  OwnedNetwork(const OwnedNetwork&) = delete;
  ~OwnedNetwork() { vt_destroy(handle); }

  std::vector<Weight> weights() const {
    std::vector<Weight> all;
    for (const auto& each : numbers) all.push_back({each.empty() ? nullptr : each.data(), Index(each.size())});
    return all;
  }
  Index create() {
    const std::vector<Weight> all = weights();
    return vt_create(&sizes, all.data(), all.size(), &handle);
  }
};

struct Found {
  Index outcome = kDone;
  std::vector<Index> sequences, lengths;
  std::vector<float> scores;
  std::vector<int32_t> lineage;
};

struct OwnedJob {
  Job job{};  // its sizes; the pointers are those of `run`
  std::vector<Index> source, starts, prefix, eos;
  std::vector<float> encoder_positions, decoder_positions, penalties;

  // `change(job)` may change the sizes after all has been made by those that are right.
  template <class Change>
  Found run(const void* network, Change change) const {
    const Index outputs = job.sentences * job.returned;
    Found found;
    found.sequences.assign(outputs * job.max_length, -7);
    found.lineage.assign(outputs * (job.max_length - job.prefix_length), -1);
    found.lengths.resize(outputs);
    found.scores.resize(outputs);
    Job native = job;
    native.source = source.data();
    native.source_starts = starts.data();
    native.prefix = prefix.data();
    native.eos = eos.data();
    native.encoder_positions = encoder_positions.data();
    native.decoder_positions = decoder_positions.data();
    native.length_penalties = penalties.data();
    native.sequences = found.sequences.data();
    native.lineage = found.lineage.data();
    native.lengths = found.lengths.data();
    native.scores = found.scores.data();
    change(native);
    found.outcome = vt_search(network, &native);
    return found;
  }
  Found run_by(Index threads, const void* network) const {
    return run(network, [=](Job& native) { native.threads = threads; });
  }
};

// ---- Files ---------------------------------------------------------------------------------------------------------

// A file is a row of blocks: the number of bytes, then the bytes.
class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {}
  bool more() { return file_.peek() != EOF; }

  template <class T>
  std::vector<T> numbers() {
    Index bytes = 0;
    file_.read(reinterpret_cast<char*>(&bytes), sizeof(bytes));
    std::vector<T> found(bytes / sizeof(T));
    if (bytes % sizeof(T) == 0) file_.read(reinterpret_cast<char*>(found.data()), bytes);
    if (!file_ || bytes % sizeof(T)) throw std::runtime_error("the file ends early, or holds other structures");
    return found;
  }

 private:
  std::ifstream file_;
};

template <class T>
void put(std::ofstream& file, const std::vector<T>& numbers) {
  const Index bytes = numbers.size() * sizeof(T);
  file.write(reinterpret_cast<const char*>(&bytes), sizeof(bytes));
  file.write(reinterpret_cast<const char*>(numbers.data()), bytes);
}

// A file holds a network, then searches.
void search_file(const char* in, const char* out) {
  Reader reader(in);
  std::ofstream file(out, std::ios::binary);
  OwnedNetwork network;
  network.sizes = reader.numbers<Sizes>().at(0);
  network.numbers.resize(reader.numbers<Index>().at(0));
  for (auto& each : network.numbers) each = reader.numbers<float>();
  if (network.create() != kDone) throw std::runtime_error(std::string("vt_create: ") + vt_message());
  while (reader.more()) {
    OwnedJob job;
    job.job = reader.numbers<Job>().at(0);
    job.job.release_interpreter = nullptr;
    job.job.take_interpreter = nullptr;
    job.job.check_signals = nullptr;
    for (auto* each : {&job.source, &job.starts, &job.prefix, &job.eos}) *each = reader.numbers<Index>();
    for (auto* each : {&job.encoder_positions, &job.decoder_positions, &job.penalties}) *each = reader.numbers<float>();
    const Found found = job.run_by(job.job.threads, network.handle);
    if (found.outcome != kDone) throw std::runtime_error(std::string("vt_search: ") + vt_message());
    put(file, found.sequences);
    put(file, found.scores);
  }
  if (!file.flush()) throw std::runtime_error(std::string("cannot write ") + out);
}

// ---- Random networks and searches ----------------------------------------------------------------------------------

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  Index from(Index low, Index high) { return low + engine_() % uint64_t(high - low + 1); }
  bool one_in(Index n) { return from(1, n) == 1; }
  float normal() { return normal_(engine_); }
  template <class T>
  T of(std::initializer_list<T> list) {
    return list.begin()[from(0, list.size() - 1)];
  }
  // Often small, and often at the edge of a vector or panel.
  Index size(Index most) {
    const Index edge = of<Index>({kLanes, kPanel, 2 * kPanel}) + from(-1, 1);
    return one_in(4) ? edge : from(1, one_in(4) ? most : 8);
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

// As engine_compiled.py lists them.
class RandomWeights {
 public:
  RandomWeights(Random& random, OwnedNetwork& network) : random_(random), sizes_(network.sizes), all_(network.numbers) {
    usual_ = random.of({0.0f, 0.1f, 0.3f, 1.0f, 1.0f, 3.0f});
    strange_ = random.one_in(3);
    for (Index i = 0; i < sizes_.encoder_layers; ++i)
      layer(sizes_.encoder_heads, sizes_.encoder_d_k, sizes_.encoder_d_v, sizes_.encoder_ffn);
    norm();
    const Index heads = sizes_.decoder_heads, d_k = sizes_.decoder_d_k, d_v = sizes_.decoder_d_v;
    for (Index i = 0; i < sizes_.decoder_layers; ++i) {
      layer(heads, d_k, d_v, sizes_.decoder_ffn);
      linear(heads * d_k, sizes_.d_model);
      linear(sizes_.d_model, heads * d_v);
      norm();
    }
    norm();
    linear(sizes_.decoder_layers * heads * (d_k + d_v), sizes_.d_model);
    linear(sizes_.vocabulary, sizes_.d_model);
    add(sizes_.source_vocabulary * sizes_.d_model);
    add(sizes_.vocabulary * sizes_.d_model);
  }

 private:
  void add(Index count) {
    float scale = usual_;
    if (strange_ && random_.one_in(6)) scale = random_.of({0.0f, 1e-42f, 1e-20f, 1e12f, 1e30f, 3e38f, kInfinity});
    std::vector<float>& numbers = all_.emplace_back(count);
    for (float& each : numbers) each = random_.normal() * scale;
    if (strange_ && random_.one_in(30)) numbers[random_.from(0, count - 1)] = std::nanf("");
  }
  void linear(Index out, Index in) {
    add(out * in);
    add(out);
  }
  void norm() {
    for (int i = 0; i < 2; ++i) missing_ ? void(all_.emplace_back()) : add(sizes_.d_model);
    missing_ = random_.one_in(4);
  }
  void layer(Index heads, Index d_k, Index d_v, Index ffn) {
    linear(heads * d_k, sizes_.d_model);
    linear(heads * (d_k + d_v), sizes_.d_model);
    linear(sizes_.d_model, heads * d_v);
    norm();
    linear(ffn, sizes_.d_model);
    linear(sizes_.d_model, ffn);
    norm();
  }

  Random& random_;
  const Sizes& sizes_;
  std::vector<std::vector<float>>& all_;
  float usual_ = 1.0f;
  bool strange_ = false, missing_ = false;
};

void make(Random& random, OwnedNetwork& network) {
  Sizes& sizes = network.sizes;
  sizes = {.d_model = random.size(60), .source_vocabulary = random.size(300), .vocabulary = random.size(300),
           .encoder_layers = random.from(1, 3), .encoder_heads = random.from(1, 4), .encoder_ffn = random.size(90),
           .decoder_layers = random.from(1, 3), .decoder_heads = random.from(1, 4), .decoder_ffn = random.size(90),
           .encoder_d_k = random.size(60), .encoder_d_v = random.size(60), .decoder_d_k = random.size(60),
           .decoder_d_v = random.size(60), .normalize_before = random.from(0, 1), .int8 = random.from(0, 1),
           .activation = Activation(random.from(0, 3)), .eps = random.of({1e-5f, 1e-5f, 1e-12f, 0.0f}),
           .encoder_scale = random.of({1.0f, 8.0f}), .decoder_scale = random.of({1.0f, 8.0f})};
  RandomWeights(random, network);
}

OwnedJob make_job(Random& random, const Sizes& sizes) {
  OwnedJob made;
  Job& job = made.job;
  job.sentences = random.from(1, random.one_in(5) ? 12 : 4);
  job.beams = random.one_in(3) ? 0 : random.from(1, 9);
  job.returned = random.from(1, std::max<Index>(1, job.beams));
  job.prefix_length = random.from(1, random.one_in(8) ? 40 : 3);
  job.max_length = job.prefix_length + random.from(1, random.one_in(8) ? 60 : 20);
  job.min_length = random.from(0, random.one_in(2) ? job.max_length + 2 : 4);
  job.early_stopping = random.from(0, 2);
  job.eos_count = random.from(0, 3);
  const auto ids = [&](std::vector<Index>& to, Index count, Index vocabulary) {
    for (Index i = 0; i < count; ++i) to.push_back(random.from(0, vocabulary - 1));
  };
  made.starts.push_back(0);
  for (Index s = 0; s < job.sentences; ++s)
    made.starts.push_back(made.starts.back() + random.from(0, random.one_in(12) ? 200 : random.one_in(4) ? 70 : 9));
  for (Index s = 0; s < job.sentences; ++s)
    job.encoder_position_count = std::max(job.encoder_position_count, made.starts[s + 1] - made.starts[s]);
  job.decoder_position_count = job.max_length + random.from(0, 2);
  ids(made.source, made.starts.back(), sizes.source_vocabulary);
  ids(made.prefix, job.sentences * job.prefix_length, sizes.vocabulary);
  ids(made.eos, job.eos_count, sizes.vocabulary);
  for (Index i = 0; i < job.encoder_position_count * sizes.d_model; ++i)
    made.encoder_positions.push_back(random.normal());
  for (Index i = 0; i < job.decoder_position_count * sizes.d_model; ++i)
    made.decoder_positions.push_back(random.normal());
  const float power = random.of({0.0f, 0.6f, 1.0f, 2.0f, -1.0f});
  for (Index n = 0; n <= job.max_length - job.prefix_length; ++n)
    made.penalties.push_back(n ? std::pow(float(n), power) : 1.0f);
  return made;
}

OwnedJob alone(const OwnedJob& batch, Index s) {
  OwnedJob made = batch;
  const Index begin = batch.starts[s], end = batch.starts[s + 1], prefix = batch.job.prefix_length;
  made.job.sentences = 1;
  made.starts = {0, end - begin};
  made.source.assign(batch.source.begin() + begin, batch.source.begin() + end);
  made.prefix.assign(batch.prefix.begin() + s * prefix, batch.prefix.begin() + (s + 1) * prefix);
  return made;
}

// ---- The fuzz ------------------------------------------------------------------------------------------------------

uint64_t seed = 0;

void print_seed() {
  char text[64];
  const int size = std::snprintf(text, sizeof(text), "\nseed %llu\n", static_cast<unsigned long long>(seed));
  (void)!write(STDERR_FILENO, text, size);
}

void die(int signal) {
  print_seed();
  if (signal == SIGALRM) (void)!write(STDERR_FILENO, "it hangs\n", 9);
  std::signal(signal, SIG_DFL);
  std::raise(signal == SIGALRM ? SIGABRT : signal);
}

void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s (%s)\n", what, vt_message());
  std::abort();
}

bool same_score(float a, float b) { return a == b || (a != a && b != b); }

// Whether `found` has what stands in `expected` from some output on.
void demand_same(const Found& expected, Index from, const Found& found, const char* what) {
  demand(found.outcome == kDone, what);
  const auto part = [&](const auto& all, const auto& some) { return all.begin() + from * some.size(); };
  const auto equal = [&](const auto& all, const auto& some) {
    return std::equal(some.begin(), some.end(), part(all, some));
  };
  demand(equal(expected.sequences, found.sequences) && equal(expected.lengths, found.lengths), what);
  demand(std::equal(found.scores.begin(), found.scores.end(), part(expected.scores, found.scores), same_score), what);
}

// What every output is, whatever the network.
void demand_sound(const Sizes& sizes, const OwnedJob& job, const Found& found) {
  demand(found.outcome == kDone, "a search that should be done");
  const Index prefix = job.job.prefix_length, longest = job.job.max_length;
  for (Index i = 0; i < job.job.sentences * job.job.returned; ++i) {
    const Index* sequence = &found.sequences[i * longest];
    const Index length = found.lengths[i];
    demand(length >= prefix && length <= longest, "an output's length");
    demand(std::equal(sequence, sequence + prefix, &job.prefix[i / job.job.returned * prefix]), "an output's prefix");
    for (Index t = 0; t < longest; ++t)
      demand(t < length ? sequence[t] >= 0 && sequence[t] < sizes.vocabulary : sequence[t] == -7, "an output's ids");
  }
}

void fuzz_neighbours(Random& random, const OwnedNetwork& network, const OwnedJob& job, const Found& expected) {
  demand_same(expected, 0, job.run_by(random.from(2, 5), network.handle), "several threads find something else");
  for (int i = 0; i < 2; ++i) {
    const Index s = random.from(0, job.job.sentences - 1);
    demand_same(expected, s, alone(job, s).run_by(random.from(1, 2), network.handle), "alone something else is found");
  }
}

void fuzz_at_once(Random& random, const OwnedNetwork& network, const OwnedJob& job, const Found& expected) {
  std::vector<std::thread> callers;
  std::vector<Found> found(3);
  for (Found& each : found)
    callers.emplace_back([&, threads = random.from(1, 3)] { each = job.run_by(threads, network.handle); });
  for (std::thread& caller : callers) caller.join();
  for (const Found& each : found) demand_same(expected, 0, each, "several searches at once find something else");
}

// Some allocation fails, in the search or while the network is made.
void fuzz_allocations(Random& random, const OwnedNetwork& network, const OwnedJob& job, const Found& expected) {
  OwnedNetwork second;
  second.sizes = network.sizes;
  second.numbers = network.numbers;
  const std::vector<Weight> weights = second.weights();
  const Index threads = random.from(1, 3);
  const bool in_search = random.one_in(2);
  Found found = expected;
  const auto attempt = [&] {
    if (in_search) return found = job.run_by(threads, network.handle), found.outcome;
    return vt_create(&second.sizes, weights.data(), weights.size(), &second.handle);
  };
  const long before = allocations_counted;
  demand(attempt() == kDone, "a search that should be done");
  const long count = allocations_counted - before;
  if (!in_search) vt_destroy(std::exchange(second.handle, nullptr));

  const long ours = 4;  // `OwnedJob::run` makes four vectors before
  const long first = random.from(in_search ? ours : 0, count - 1), failed_before = failures_counted;
  repeat_failure_after = random.one_in(2) ? -1 : random.from(0, 3);
  allocations_left = first;
  const Index outcome = attempt();
  allocations_left = -1;
  const bool failed = failures_counted != failed_before;
  demand(outcome == (failed ? kNoMemory : kDone), "an allocation that fails");
  if (!failed && in_search) demand_same(expected, 0, found, "after a failed allocation something else is found");
}

void fuzz_threads(Random& random, const OwnedNetwork& network, const OwnedJob& job, const Found& expected) {
  threads_fail = true;
  const Found found = job.run_by(random.from(2, 5), network.handle);
  threads_fail = false;
  demand(found.outcome == kNoThread || found.outcome == kDone, "a thread that cannot be started");
  if (found.outcome == kDone) demand_same(expected, 0, found, "with threads that may fail something else is found");
}

// A size or id that is wrong, of so many kinds: the search must not begin. The message may find no memory.
constexpr Index kWrongJobs = 13;
void fuzz_wrong_job(Random& random, const OwnedNetwork& network, const OwnedJob& job, Index kind) {
  OwnedJob wrong = job;
  const Index huge = Index(1) << 61, small = random.from(-2, 0);
  const auto spoil = [&](std::vector<Index>& ids, Index vocabulary) {
    if (ids.empty()) return false;
    ids[random.from(0, ids.size() - 1)] = random.of<Index>({-1, vocabulary, huge, -huge});
    return true;
  };
  bool spoilt = true;
  if (kind == 0) spoilt = spoil(wrong.source, network.sizes.source_vocabulary);
  if (kind == 1) spoilt = spoil(wrong.prefix, network.sizes.vocabulary);
  if (kind == 2) spoilt = spoil(wrong.eos, network.sizes.vocabulary);
  if (kind == 3) wrong.starts[0] = random.of<Index>({1, -1});
  if (kind == 4) wrong.starts[1] = random.of<Index>({-1, huge, wrong.starts.back() + 300});
  if (!spoilt) return;
  const bool without_memory = random.one_in(2);
  const Found found = wrong.run(network.handle, [&](Job& native) {
    const Index prefix = native.prefix_length, positions = native.decoder_position_count;
    if (kind == 5) native.sentences = small;
    if (kind == 6) native.prefix_length = random.of<Index>({small, native.max_length, huge});
    if (kind == 7) native.max_length = random.of<Index>({small, prefix, positions + 1});
    if (kind == 8) native.returned = random.of<Index>({small, std::max<Index>(1, native.beams) + 1, huge});
    if (kind == 9) native.threads = small;
    if (kind == 10) native.beams = random.of<Index>({-1, huge, Index(1) << 31});
    if (kind == 11) native.eos_count = -1 + small;
    if (kind == 12) native.encoder_position_count = small - 1;
    repeat_failure_after = 0;
    allocations_left = without_memory ? random.from(0, 2) : -1;
  });
  allocations_left = -1;
  const bool refused = found.outcome == kOutOfRange || found.outcome == kOther;
  demand(refused || (without_memory && found.outcome == kNoMemory), "a wrong search is refused");
}

// The sizes, or the weights, are not those of the network.
constexpr Index kWrongNetworks = 4;
void fuzz_wrong_network(Random& random, const OwnedNetwork& network, Index kind) {
  Sizes sizes = network.sizes;
  std::vector<Weight> weights = network.weights();
  Index* const fields[] = {&sizes.d_model,        &sizes.source_vocabulary, &sizes.vocabulary,  &sizes.encoder_layers,
                           &sizes.encoder_heads,  &sizes.encoder_ffn,       &sizes.encoder_d_k, &sizes.encoder_d_v,
                           &sizes.decoder_layers, &sizes.decoder_heads,     &sizes.decoder_ffn, &sizes.decoder_d_k,
                           &sizes.decoder_d_v};
  if (kind == 0) weights.pop_back();
  if (kind == 1) weights.push_back(weights.back());
  if (kind == 2) weights[random.from(0, weights.size() - 1)].count += random.of<Index>({-1, 1});
  if (kind == 3) {
    Index& field = *fields[random.from(0, std::size(fields) - 1)];
    field = random.of<Index>({0, -1, -field, field + 1});
  }
  void* handle = nullptr;
  const Index outcome = vt_create(&sizes, weights.data(), weights.size(), &handle);
  demand(outcome == kOther && !handle, "a wrong network is refused");
}

// The interpreter's functions: it is released and taken in turn, and a Ctrl-C ends the search.
thread_local int released = 0;
std::atomic<int> signals_left{0};
bool slow = false;
void* release() {
  if (slow) std::this_thread::sleep_for(std::chrono::milliseconds(60));  // the next step will ask for signals
  return ++released, &released;
}
void take(void* state) { --released, demand(state == &released, "the interpreter's state"); }
int check_signals() { return signals_left.fetch_sub(1) <= 0; }

void fuzz_interpreter(Random& random, const OwnedNetwork& network, const OwnedJob& job, const Found& expected) {
  signals_left = random.from(0, 1);
  slow = random.one_in(4);
  const Found found = job.run(network.handle, [&](Job& native) {
    native.threads = random.from(1, 3);
    native.release_interpreter = release;
    native.take_interpreter = take;
    native.check_signals = check_signals;
  });
  demand(released == 0, "the interpreter has been taken again");
  demand(found.outcome == kInterrupted || found.outcome == kDone, "a search that is interrupted");
  if (found.outcome == kDone) demand_same(expected, 0, found, "with an interpreter something else is found");
}

void fuzz_round(Index& searches) {
  Random random(seed);
  OwnedNetwork network;
  make(random, network);
  demand(network.create() == kDone, "a network that should be made");
  for (Index jobs = random.from(1, 3); jobs > 0; --jobs, ++searches) {
    const OwnedJob job = make_job(random, network.sizes);
    const Found expected = job.run_by(1, network.handle);
    demand_sound(network.sizes, job, expected);
    fuzz_neighbours(random, network, job, expected);
    if (random.one_in(3)) fuzz_at_once(random, network, job, expected);
    if (random.one_in(2)) fuzz_allocations(random, network, job, expected);
    if (random.one_in(4)) fuzz_threads(random, network, job, expected);
    if (random.one_in(4)) fuzz_interpreter(random, network, job, expected);
    for (Index kind = 0; kind < kWrongJobs; ++kind) fuzz_wrong_job(random, network, job, kind);
    for (Index kind = 0; kind < kWrongNetworks; ++kind) fuzz_wrong_network(random, network, kind);
  }
}

void fuzz(double seconds) {
  for (int signal : {SIGALRM, SIGABRT, SIGSEGV, SIGFPE, SIGILL, SIGBUS}) std::signal(signal, die);
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(print_seed);
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  Index searches = 0, rounds = 0;
  for (; std::chrono::duration<double>(Clock::now() - start).count() < seconds; ++seed, ++rounds) {
    alarm(300);
    fuzz_round(searches);
  }
  std::printf("%lld networks, %lld searches\n", static_cast<long long>(rounds), static_cast<long long>(searches));
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count == 4 ? arguments[1] : "";
  try {
    if (mode == "search") return search_file(arguments[2], arguments[3]), 0;
    if (mode == "fuzz") return seed = std::stoull(arguments[3]), fuzz(std::stod(arguments[2])), 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::fprintf(stderr, "usage: driver search IN OUT | driver fuzz SECONDS SEED\n");
  return 2;
}
