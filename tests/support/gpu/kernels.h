// What CUDA's kernels find on a GPU, for this CPU's compiler. Threads of a group run one after another, or, where
// they wait for each other, side by side; groups run one after another.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define alignas(bytes) __attribute__((aligned(bytes)))  // which may follow __shared__
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")

inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Numbers of 16 bits: float16 is the compiler's, bfloat16 the upper half of a float, rounded to nearest, ties to even.
struct half {
  _Float16 value;
  half() = default;
  half(float x) : value(static_cast<_Float16>(x)) {}
  operator float() const { return value; }
};
struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    bits = x != x ? 0x7fff : (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  }
  operator float() const {
    uint32_t b = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &b, 4);
    return x;
  }
};
using __half = half;
struct __half2 { half x, y; };
struct nv_bfloat162 {
  nv_bfloat16 x, y;
  nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) : x(x), y(y) {}
};
template <class T> bool __hgt(T a, T b) { return float(a) > float(b); }
template <class T> bool __hlt(T a, T b) { return float(a) < float(b); }
inline half __float2half(float x) { return x; }
inline half __float2half_rn(float x) { return x; }
inline float __half2float(half x) { return x; }
inline nv_bfloat16 __float2bfloat16(float x) { return x; }
inline nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(nv_bfloat16 x) { return x; }

struct Place { unsigned x, y, z; };
inline thread_local Place threadIdx, blockIdx;

// A group whose threads wait for each other.
struct Group {
  static constexpr unsigned WARP = 32;
  struct Warp {
    std::barrier<> met;
    uint32_t told[WARP];
    explicit Warp(unsigned lanes) : met(lanes) {}
  };
  std::barrier<> met;
  std::vector<std::unique_ptr<Warp>> warps;
  explicit Group(unsigned threads) : met(threads) {
    for (unsigned i = 0; i < threads; i += WARP)
      warps.push_back(std::make_unique<Warp>(std::min(WARP, threads - i)));
  }
};
inline Group* group;
inline thread_local unsigned thread;

inline void __syncthreads() { group->met.arrive_and_wait(); }
inline unsigned __activemask() { return 0xffffffffu; }

// The value of a lane of the warp: `from` says which, of this one's.
template <class T, class F> T told(T value, F from) {
  static_assert(sizeof(T) == 4);
  auto& warp = *group->warps[thread / Group::WARP];
  unsigned lane = thread % Group::WARP;
  memcpy(&warp.told[lane], &value, 4);
  warp.met.arrive_and_wait();
  memcpy(&value, &warp.told[from(lane)], 4);
  warp.met.arrive_and_wait();
  return value;
}
template <class T> T __shfl_sync(unsigned, T value, unsigned of, unsigned width) {
  return told(value, [=](unsigned lane) { return lane - lane % width + of % width; });
}
template <class T> T __shfl_down_sync(unsigned, T value, unsigned by, unsigned width) {
  return told(value, [=](unsigned lane) { return lane % width + by < width ? lane + by : lane; });
}

template <class F> void each(Place sizes, F body) {
  for (unsigned z = 0; z < sizes.z; ++z)
    for (unsigned y = 0; y < sizes.y; ++y)
      for (unsigned x = 0; x < sizes.x; ++x) body(Place{x, y, z});
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** given, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(given[I])...);
}

template <class... A>
void launch(void (*kernel)(A...), void** given, Place grid, Place block, bool waits) {
  unsigned count = block.x * block.y * block.z;
  auto run = [&](Place at, Place lane) {
    blockIdx = at, threadIdx = lane, thread = lane.x + block.x * (lane.y + block.y * lane.z);
    call(kernel, given, std::index_sequence_for<A...>{});
  };
  each(grid, [&](Place at) {
    if (!waits) return each(block, [&](Place lane) { run(at, lane); });
    Group here(count);
    group = &here;
    std::vector<std::jthread> threads;
    each(block, [&](Place lane) {
      threads.emplace_back([&run, &here, at, lane] {
        run(at, lane);
        here.warps[thread / Group::WARP]->met.arrive_and_drop();
        here.met.arrive_and_drop();
      });
    });
  });
}

#define LAUNCHED(name, waits) \
  extern "C" void launch_##name(void** given, Place grid, Place block) { launch(name, given, grid, block, waits); }
