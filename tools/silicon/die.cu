// A die's command program on one multiprocessor of a Hopper GPU: what the timing engine's rules are held against (docs/performance.md).
//
// One block of threads is one die.  Its warps are the die's units, its shared memory is the die's SRAM, its counters are the tokens.  Every unit takes its commands in
// program order, waits until the units it depends on have done as many commands as it needs, and does work of the command's size: bulk copies between global and shared
// memory (up to `outstanding` of a queue in flight), matrix products on tensor cores, conversions, stores, arithmetic, and all-reduces between blocks.  The numbers are of
// no interest; the time is.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a tools/silicon/die.cu -o die && ./die programs.bin > measured.jsonl
//
// programs.bin is written by `python -m tyir.tools.silicon.measure --export` and holds, in 32-bit little-endian words: 0x79746469, the number of programs; for each: the
// length of its name in bytes, the name (padded to words), dies, outstanding, bytes of a die's DRAM (low, high); for each die and each of 9 units: the number of its
// commands, and the commands of 16 words each:
//     0..8   how many commands of each unit must be done          9, 10, 11  the command's sizes (see the units below)
//     12, 13 DRAM address (low, high)      14 SRAM offset         15         DRAM bytes between runs
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

constexpr int kUnits = 9, kWords = 16, kQueues = 4, kMostOutstanding = 8;
constexpr int kStore = 3, kDequant = 4, kCube = 5, kDrain = 6, kVector = 7, kLinks = 8;
constexpr int kWarps = kQueues - 1 + kUnits;  // the load queues have a warp that issues and one that sees the data arrive
constexpr uint32_t kBatch = 16, kBatchBytes = kBatch * kWords * 4;
constexpr uint32_t kSram = 192 * 1024, kWindow = 64 * 1024, kPiece = 16 * 1024;
constexpr long long kSpin = 8000000;  // cycles by which the clock is told

struct Die {
  const uint32_t* commands[kUnits];
  uint32_t count[kUnits];
  uint8_t* dram;
};

struct Times {
  long long cycles, ns;
};

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ long long now_ns() {
  long long t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

__device__ uint32_t load_shared(uint32_t at) {
  uint32_t value;
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(value) : "r"(at));
  return value;
}

__device__ void store_shared(uint32_t at, uint32_t value) { asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory"); }

__device__ void fence() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

__device__ bool has_arrived(uint32_t bar, uint32_t parity) {
  uint32_t arrived;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(arrived) : "r"(bar), "r"(parity) : "memory");
  return arrived;
}

__device__ void expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ void copy_in(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}

// Addresses in shared memory, and the thread's place in its warp (kept in a register: reading it anew takes as long as a command).
struct Block {
  uint32_t sram, done, bars, batches, batch_bars, link_bar, lane;  // bars [kQueues][kMostOutstanding]; batches [kWarps][2][kBatch][kWords], batch_bars [kWarps][2]
};

// A warp's commands, which come in batches while the ones before are at work; `take` gives the command's word `lane` in every lane below 16.
struct Fetch {
  const uint8_t* commands;
  uint32_t count, buffers, bars, lane;
  __device__ Fetch(const Block& b, const uint32_t* from, uint32_t count, uint32_t warp)
      : commands(reinterpret_cast<const uint8_t*>(from)), count(count), buffers(b.batches + warp * 2 * kBatchBytes), bars(b.batch_bars + warp * 16), lane(b.lane) {
    bring(0);
    bring(1);
  }
  __device__ void bring(uint32_t batch) {
    if (lane || batch * kBatch >= count) return;
    const uint32_t bytes = min(kBatch, count - batch * kBatch) * kWords * 4, bar = bars + batch % 2 * 8;
    expect(bar, bytes);
    copy_in(buffers + batch % 2 * kBatchBytes, commands + static_cast<size_t>(batch) * kBatchBytes, bytes, bar);
  }
  __device__ uint32_t take(uint32_t index) {
    const uint32_t batch = index / kBatch;
    if (index % kBatch == 0) {
      if (batch) {
        __syncwarp();
        bring(batch + 1);
      }
      while (!has_arrived(bars + batch % 2 * 8, batch / 2 & 1)) {
      }
    }
    return load_shared(buffers + batch % 2 * kBatchBytes + index % kBatch * (kWords * 4) + (lane & 15) * 4);
  }
};

__device__ bool tokens_done(const Block& b, uint32_t word) { return b.lane >= kUnits || load_shared(b.done + b.lane * 4) >= word; }

__device__ void wait_for_tokens(const Block& b, uint32_t word) {
  while (!__all_sync(~0u, tokens_done(b, word))) {
  }
  fence();
}

__device__ void finish(const Block& b, int unit, uint32_t index) {
  fence();
  __syncwarp();
  if (b.lane == 0) store_shared(b.done + unit * 4, index + 1);
}

__device__ uint32_t word_of(uint32_t word, int index) { return __shfl_sync(~0u, word, index); }

__device__ uint64_t address_of(uint32_t word) { return word_of(word, 12) | static_cast<uint64_t>(word_of(word, 13)) << 32; }

__device__ uint32_t place_of(uint32_t sram, uint32_t run, uint32_t bytes) { return (sram + run * bytes) % (kSram - bytes) & ~15u; }

// ---------------------------------------------------------------------------------------------------------------- DMA queues
// sizes: bytes of a run (a multiple of 16), runs

__device__ void issue_loads(const Block& b, const Die& die, int queue, uint32_t outstanding) {
  const uint32_t count = die.count[queue], own = b.done + queue * 4, bars = b.bars + queue * kMostOutstanding * 8;
  const uint8_t* dram = die.dram;
  Fetch fetch(b, die.commands[queue], count, queue);
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t word = fetch.take(i);
    while (!__all_sync(~0u, tokens_done(b, word) && i - load_shared(own) < outstanding)) {
    }
    const uint32_t bytes = word_of(word, 9), runs = word_of(word, 10), sram = word_of(word, 14), stride = word_of(word, 15);
    const uint8_t* source = dram + address_of(word);
    const uint32_t bar = bars + i % outstanding * 8;
    if (b.lane == 0) expect(bar, bytes * runs);
    __syncwarp();
    for (uint32_t run = b.lane; run < runs; run += 32) copy_in(b.sram + place_of(sram, run, bytes), source + static_cast<uint64_t>(run) * stride, bytes, bar);
  }
}

__device__ void see_loads_arrive(const Block& b, const Die& die, int queue, uint32_t outstanding) {
  const uint32_t count = die.count[queue], bars = b.bars + queue * kMostOutstanding * 8;
  for (uint32_t i = 0; i < count; ++i) {
    while (!has_arrived(bars + i % outstanding * 8, i / outstanding & 1)) {
    }
    finish(b, queue, i);
  }
}

__device__ void wait_for_stores(uint32_t pending) {
  switch (pending) {
    case 0: asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.bulk.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.bulk.wait_group 2;" ::: "memory"); break;
    default: asm volatile("cp.async.bulk.wait_group 3;" ::: "memory"); break;
  }
}

// Groups of bulk stores are a thread's own: the first lane issues them and sees them done, the oldest first.
__device__ void store(const Block& b, const Die& die, uint32_t outstanding) {
  const uint32_t count = die.count[kStore], most = min(outstanding, 4u);
  uint8_t* dram = die.dram;
  Fetch fetch(b, die.commands[kStore], count, kStore);
  uint32_t completed = 0;
  const auto complete = [&](uint32_t issued) {
    if (b.lane == 0) {
      wait_for_stores(issued - completed - 1);
      store_shared(b.done + kStore * 4, completed + 1);
    }
    ++completed;
  };
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t word = fetch.take(i);
    while (!__all_sync(~0u, tokens_done(b, word) && i - completed < most))
      if (completed < i) complete(i);
    const uint32_t bytes = word_of(word, 9), runs = word_of(word, 10), sram = word_of(word, 14), stride = word_of(word, 15);
    uint8_t* target = dram + address_of(word);
    if (b.lane == 0) {
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      for (uint32_t run = 0; run < runs; ++run)
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target + static_cast<uint64_t>(run) * stride),
                     "r"(b.sram + place_of(sram, run, bytes)), "r"(bytes)
                     : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
    __syncwarp();
  }
  while (completed < count) complete(count);
}

// ---------------------------------------------------------------------------------------------------------------- compute units
// sizes: iterations

__device__ void multiply(const Block& b, uint32_t iterations, float* sink) {  // 16 x 16 x 16 multiply-accumulates each
  float c[8] = {};
  const uint32_t base = b.sram + b.lane * 16;
#pragma unroll 4
  for (uint32_t i = 0; i < iterations; ++i) {
    uint32_t x[4], w[4];
    const uint32_t at = base + (i * 1024 & (kWindow - 1));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(at + 512));
    for (int half = 0; half < 2; ++half)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+f"(c[4 * half]), "+f"(c[4 * half + 1]), "+f"(c[4 * half + 2]), "+f"(c[4 * half + 3])
                   : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(w[2 * half]), "r"(w[2 * half + 1]));
  }
  for (float value : c) *sink += value;
}

__device__ void widen(const Block& b, uint32_t iterations) {  // 256 weights of 4 bits to f16
#pragma unroll 4
  for (uint32_t i = 0; i < iterations; ++i) {
    const uint32_t at = i * 512 & (kWindow - 1), q = load_shared(b.sram + kWindow + (at >> 2) + b.lane * 4);
    uint32_t w[4];
    for (int j = 0; j < 4; ++j) {
      const uint32_t bits = (q >> (4 * j) & 0x000f000fu) | 0x64006400u;  // 1024 + q, exactly
      const __half2 value = __hmul2(__hsub2(*reinterpret_cast<const __half2*>(&bits), __float2half2_rn(1032.f)), __float2half2_rn(0.01f));
      w[j] = *reinterpret_cast<const uint32_t*>(&value);
    }
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(b.sram + at + b.lane * 16), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
  }
}

__device__ void drain(const Block& b, uint32_t iterations) {  // 512 bytes of sums
#pragma unroll 4
  for (uint32_t i = 0; i < iterations; ++i)
    asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(b.sram + (i * 512 & (kWindow - 1)) + b.lane * 16), "r"(i) : "memory");
}

__device__ void compute_rows(const Block& b, uint32_t iterations) {  // 64 elements of f16 each
#pragma unroll 4
  for (uint32_t i = 0; i < iterations; ++i) {
    const uint32_t at = b.sram + (i * 128 & (kWindow - 1)) + b.lane * 4, bits = load_shared(at);
    __half2 v = *reinterpret_cast<const __half2*>(&bits);
    for (int j = 0; j < 3; ++j) v = __hfma2(v, __float2half2_rn(0.5f), __float2half2_rn(0.25f));
    store_shared(at, *reinterpret_cast<uint32_t*>(&v));
  }
}

template <int unit>
__device__ void work(const Block& b, const Die& die, float* sink) {
  const uint32_t count = die.count[unit];
  Fetch fetch(b, die.commands[unit], count, unit);
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t word = fetch.take(i), iterations = word_of(word, 9);
    wait_for_tokens(b, word);
    if (unit == kCube) multiply(b, iterations, sink);
    if (unit == kDequant) widen(b, iterations);
    if (unit == kDrain) drain(b, iterations);
    if (unit == kVector) compute_rows(b, iterations);
    finish(b, unit, i);
  }
}

// ---------------------------------------------------------------------------------------------------------------- dies that meet
// sizes: bytes from each other die in a phase, dies, bytes to the own DRAM; in word 14 how many iterations of adding, in word 15 how many phases: 1 sends everything to
// everybody, 2 are reduce-scatter and all-gather

__device__ void meet(const Block& b, uint32_t* arrived, uint32_t& turn, uint32_t dies) {
  __syncwarp();
  ++turn;
  if (b.lane == 0) {
    __threadfence();
    atomicAdd(arrived, 1);
    uint32_t seen = 0;
    while (seen < turn * dies) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
  }
  __syncwarp();
}

__device__ void exchange(const Block& b, const Die* dies, const Die& die, uint32_t own, uint32_t* arrived) {
  Fetch fetch(b, die.commands[kLinks], die.count[kLinks], kLinks);
  uint32_t exchanges = 0, turn = 1;  // the first was the start of the step
  for (uint32_t i = 0; i < die.count[kLinks]; ++i) {
    const uint32_t word = fetch.take(i);
    wait_for_tokens(b, word);
    const uint32_t bytes = word_of(word, 9), count = word_of(word, 10), to_dram = word_of(word, 11), phases = word_of(word, 15), added = word_of(word, 14);
    meet(b, arrived, turn, count);
    for (uint32_t phase = 0; phase < phases; ++phase) {
      if (bytes) {
        if (b.lane == 0) expect(b.link_bar, bytes * (count - 1));
        __syncwarp();
        const uint32_t pieces = (bytes + kPiece - 1) / kPiece;
        for (uint32_t i = b.lane; i < pieces * (count - 1); i += 32) {
          const uint32_t at = i % pieces * kPiece;
          copy_in(b.sram + place_of(0, i, kPiece), dies[(own + 1 + i / pieces) % count].dram + at, min(bytes - at, kPiece), b.link_bar);
        }
        while (!has_arrived(b.link_bar, exchanges & 1)) {
        }
        ++exchanges;
      }
      if (phase == 0) compute_rows(b, added);
      for (uint32_t at = b.lane; phase + 1 == phases && at < to_dram / 16; at += 32) reinterpret_cast<uint4*>(die.dram)[at] = uint4{i, i, i, i};
      meet(b, arrived, turn, count);
    }
    finish(b, kLinks, i);
  }
}

__global__ void __launch_bounds__(32 * kWarps, 1) run(const Die* dies, uint32_t outstanding, uint32_t* arrived, Times* times, float* nowhere) {
  extern __shared__ __align__(128) uint8_t sram[];
  __shared__ __align__(128) uint8_t batches[kWarps * 2 * kBatchBytes];
  __shared__ uint32_t done[kUnits];
  __shared__ uint64_t bars[kQueues * kMostOutstanding], batch_bars[kWarps * 2], link_bar;
  __shared__ Die die;
  uint32_t lane;
  asm volatile("mov.u32 %0, %laneid;" : "=r"(lane));
  const int warp = threadIdx.x / 32;
  const Block b{shared_address(sram), shared_address(done), shared_address(bars), shared_address(batches), shared_address(batch_bars), shared_address(&link_bar), lane};
  for (uint32_t i = threadIdx.x; i < kSram / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(sram)[i] = 0x3c003c00u;  // ones
  if (threadIdx.x == 0) {
    die = dies[blockIdx.x];
    for (int i = 0; i < kUnits; ++i) done[i] = 0;
    for (uint64_t& bar : bars) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&bar)));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&link_bar)));
    for (uint64_t& bar : batch_bars) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&bar)));
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  uint32_t turn = 0;
  if (warp == 0) meet(b, arrived, turn, gridDim.x);
  __syncthreads();
  const long long start = clock64(), start_ns = now_ns();
  float sink = 0;
  switch (warp) {
    case kStore: store(b, die, outstanding); break;
    case kDequant: work<kDequant>(b, die, &sink); break;
    case kCube: work<kCube>(b, die, &sink); break;
    case kDrain: work<kDrain>(b, die, &sink); break;
    case kVector: work<kVector>(b, die, &sink); break;
    case kLinks: exchange(b, dies, die, blockIdx.x, arrived); break;
    default: warp < kStore ? issue_loads(b, die, warp, outstanding) : see_loads_arrive(b, die, warp - kUnits, outstanding);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    times[blockIdx.x].cycles = clock64() - start;
    times[blockIdx.x].ns = now_ns() - start_ns;
  }
  if (sink == 1.2345f) *nowhere = sink;
}

// The commands are on the chip when the step begins, as a command processor prefetches them; the data is not.
__global__ void touch(const Die* dies, float* nowhere) {
  uint32_t sum = 0;
  for (int unit = 0; unit < kUnits; ++unit)
    for (uint32_t i = threadIdx.x; i < dies[blockIdx.x].count[unit] * kWords; i += blockDim.x) sum += dies[blockIdx.x].commands[unit][i];
  if (sum == 12345) *nowhere = 1;
}

__global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  FILE* file = argc > 1 ? std::fopen(argv[1], "rb") : nullptr;
  const int repeats = argc > 2 ? std::atoi(argv[2]) : 9;
  if (!file) {
    std::fprintf(stderr, "usage: die programs.bin [repeats]\n");
    return 1;
  }
  const auto word = [&] {
    uint32_t value = 0;
    if (std::fread(&value, 4, 1, file) != 1) std::fprintf(stderr, "the file ends too early\n"), std::exit(1);
    return value;
  };
  if (word() != 0x79746469) return std::fprintf(stderr, "not a file of programs\n"), 1;
  const uint32_t programs = word();

  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "device");
  std::printf("{\"device\": \"%s\", \"multiprocessors\": %d}\n", properties.name, properties.multiProcessorCount);
  check(cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, kSram), "shared memory");
  const size_t flush_bytes = size_t{3} * properties.l2CacheSize;
  uint8_t* flush;
  uint32_t* arrived;
  Times* times;
  cudaEvent_t begin, end;
  float* nowhere;
  check(cudaMalloc(&flush, flush_bytes), "flush");
  check(cudaMalloc(&arrived, 4), "arrived");
  check(cudaMallocManaged(&times, sizeof(Times) * 16), "times");
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  const auto elapsed_ns = [&] {
    float ms = 0;
    check(cudaEventSynchronize(end), "event");
    check(cudaEventElapsedTime(&ms, begin, end), "event");
    return ms * 1e6;
  };
  check(cudaMalloc(&nowhere, 4), "nowhere");
  spin<<<1, 1>>>(1000000000);  // until the clock has risen

  for (uint32_t p = 0; p < programs; ++p) {
    std::string name(word(), ' ');
    for (size_t i = 0; i < name.size(); i += 4) {
      const uint32_t letters = word();
      for (size_t j = i; j < std::min(i + 4, name.size()); ++j) name[j] = static_cast<char>(letters >> 8 * (j - i) & 255);
    }
    const uint32_t count = word(), outstanding = std::min<uint32_t>(word(), kMostOutstanding);
    uint64_t dram = word();
    dram |= static_cast<uint64_t>(word()) << 32;
    std::vector<Die> host(count);
    std::vector<void*> owned;
    for (Die& die : host) {
      for (int unit = 0; unit < kUnits; ++unit) {
        die.count[unit] = word();
        std::vector<uint32_t> commands(static_cast<size_t>(die.count[unit]) * kWords);
        for (uint32_t& value : commands) value = word();
        void* target = nullptr;
        check(cudaMalloc(&target, std::max<size_t>(commands.size() * 4, 64)), "commands");
        check(cudaMemcpy(target, commands.data(), commands.size() * 4, cudaMemcpyHostToDevice), "commands");
        die.commands[unit] = static_cast<const uint32_t*>(target);
        owned.push_back(target);
      }
      check(cudaMalloc(reinterpret_cast<void**>(&die.dram), dram + (1 << 20)), "DRAM");
      check(cudaMemset(die.dram, 0x3c, dram + (1 << 20)), "DRAM");
      owned.push_back(die.dram);
    }
    Die* dies;
    check(cudaMalloc(&dies, sizeof(Die) * count), "dies");
    check(cudaMemcpy(dies, host.data(), sizeof(Die) * count, cudaMemcpyHostToDevice), "dies");
    owned.push_back(dies);
    std::vector<double> ns, cycles, clocks, events;
    for (int repeat = 0; repeat < repeats; ++repeat) {
      check(cudaMemset(flush, repeat, flush_bytes), "flush");
      check(cudaMemset(arrived, 0, 4), "arrived");
      touch<<<count, 1024>>>(dies, nowhere);
      check(cudaEventRecord(begin), "event");
      run<<<count, 32 * kWarps, kSram>>>(dies, outstanding, arrived, times, nowhere);
      check(cudaGetLastError(), name.c_str());
      check(cudaEventRecord(end), "event");
      events.push_back(elapsed_ns());
      check(cudaEventRecord(begin), "event");
      spin<<<1, 1>>>(kSpin);
      check(cudaEventRecord(end), "event");
      clocks.push_back(kSpin / elapsed_ns() * 1e3);
      check(cudaDeviceSynchronize(), name.c_str());
      long long longest = 0, longest_ns = 0;
      for (uint32_t d = 0; d < count; ++d) longest = std::max(longest, times[d].cycles), longest_ns = std::max(longest_ns, times[d].ns);
      cycles.push_back(static_cast<double>(longest));
      ns.push_back(static_cast<double>(longest_ns));
    }
    const double clock = median(clocks);
    std::printf("{\"name\": \"%s\", \"ns\": %.0f, \"timer_ns\": %.0f, \"event_ns\": %.0f, \"mhz\": %.0f, \"least_ns\": %.0f, \"most_ns\": %.0f", name.c_str(),
                median(cycles) / clock * 1e3, median(ns), median(events), clock, *std::min_element(cycles.begin(), cycles.end()) / clock * 1e3,
                *std::max_element(cycles.begin(), cycles.end()) / clock * 1e3);
    std::printf("}\n");
    std::fflush(stdout);
    for (void* p : owned) check(cudaFree(p), "free");
  }
  return 0;
}
