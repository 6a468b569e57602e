// Kernels whose cost is known, for tests of benchmarks/sass_model.py. A thread has one
// channel of a scan; STAGES says how its loads are asked for:
// 0 where they are needed, 1 all of a chunk, then waited for, 2 a chunk ahead,
// 3 a chunk ahead by TMA.
#include "device.h"

namespace mmvssm {

struct Args {
  const float* u;  // (position, channel)
  float* out;
  float rate;
  int chunks;
};

constexpr int kChunk = POSITIONS * THREADS;

MMVSSM_DEVICE float advance(float h, float u, float rate) {
  return h * exp2_fast(u * rate) + u;
}

// Each lane fetches four of 16 bytes that lie side by side.
MMVSSM_DEVICE void fetch(float* to, const float* from) {
#pragma unroll
  for (int i = 0; i < kChunk; i += THREADS * 4)
    copy_async<16>(to + i + threadIdx.x * 4, from + i + threadIdx.x * 4);
  copy_commit();
}

#if STAGES == 3
// A barrier in shared memory, at which copies by TMA report.
MMVSSM_DEVICE uint32_t shared_address(const void* memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}
MMVSSM_DEVICE void fetch_bulk(float* to, const float* from, uint64_t* barrier) {
  if (threadIdx.x != 0) return;
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "n"(kChunk * 4)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
      "%2, [%3];" ::"r"(shared_address(to)),
      "l"(from), "n"(kChunk * 4), "r"(shared_address(barrier))
      : "memory");
}
MMVSSM_DEVICE void wait_for(const uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}
#endif

MMVSSM_KERNEL(scan, Args, THREADS, 1) {
  float* buffer = reinterpret_cast<float*>(shared_memory());
  float h = 0;
#if STAGES == 2
  fetch(buffer, p.u);
#elif STAGES == 3
  uint64_t* barriers = reinterpret_cast<uint64_t*>(buffer + 2 * kChunk);
  if (threadIdx.x < 2)
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(
        shared_address(barriers + threadIdx.x)));
  sync_cta("barriers");
  fetch_bulk(buffer, p.u, barriers);
#endif
#pragma unroll 1
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    const float* u = p.u + static_cast<int64_t>(chunk) * kChunk;
    float* out = p.out + static_cast<int64_t>(chunk) * kChunk + threadIdx.x;
    float* now = buffer + (chunk & 1) * kChunk;
#if STAGES == 1
    fetch(now, u);
    copy_wait<0>();
    sync_cta("arrived");
#elif STAGES == 2
    if (chunk + 1 < p.chunks) fetch(buffer + (~chunk & 1) * kChunk, u + kChunk);
    copy_wait<1>();
    sync_cta("arrived");
#elif STAGES == 3
    if (chunk + 1 < p.chunks)
      fetch_bulk(buffer + (~chunk & 1) * kChunk, u + kChunk, barriers + (~chunk & 1));
    wait_for(barriers + (chunk & 1), chunk >> 1 & 1);
#endif
#pragma unroll
    for (int i = 0; i < POSITIONS; ++i) {
      const float* place = (STAGES == 0 ? u : now) + i * THREADS + threadIdx.x;
      h = advance(h, *place, p.rate);
      out[i * THREADS] = h;
    }
    sync_cta("read");
  }
}

// A chain of products, and as many side by side.
MMVSSM_KERNEL(products, Args, THREADS, 1) {
  float d[CHAINS][4] = {};
  const uint4* operands = reinterpret_cast<const uint4*>(p.u) + threadIdx.x;
#pragma unroll 1
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    const uint4 a = operands[chunk * THREADS];
    const uint32_t rows[4] = {a.x, a.y, a.z, a.w}, columns[2] = {a.x, a.y};
#pragma unroll
    for (int i = 0; i < 24; ++i) mma_16816<true>(d[i % CHAINS], rows, columns);
  }
#pragma unroll
  for (int i = 0; i < CHAINS; ++i) p.out[i * THREADS + threadIdx.x] = d[i][0];
}

// Loads of matrices, each from where the one before says.
MMVSSM_KERNEL(matrices, Args, THREADS, 1) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory()));
#pragma unroll 1
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t more[3];
      asm volatile(
          "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%0];"
          : "+r"(address), "=r"(more[0]), "=r"(more[1]), "=r"(more[2])::"memory");
    }
  }
  p.out[threadIdx.x] = address;
}

// One exponential in the loop over positions, and two in a loop inside.
MMVSSM_KERNEL(nested, Args, THREADS, 1) {
  float h = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    h = advance(h, p.u[chunk], p.rate);
#pragma unroll 1
    for (int i = 0; i < p.chunks; ++i)  // about 5 trips
      h = advance(advance(h, p.u[i], p.rate), h, p.rate);
    p.out[chunk * THREADS + threadIdx.x] = h;
  }
}

// A loop that prepares something and two over positions; memory of a thread's own,
// and a function that is called.
MMVSSM_KERNEL(two, Args, THREADS, 1) {
  float kept[16];
#pragma unroll 1
  for (int i = 0; i < 16; ++i) kept[i] = i;
  float h = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
#pragma unroll
    for (int i = 0; i < POSITIONS; ++i) h = advance(h, p.u[chunk + i], p.rate);
    p.out[chunk] = h;
  }
  h /= p.rate;
#pragma unroll 1
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
#pragma unroll
    for (int i = 0; i < POSITIONS; ++i) h = advance(p.u[chunk - i], h, p.rate);
    p.out[-chunk] = h;
  }
  p.out[0] = kept[p.chunks & 15];
}

// What is seldom needed lies behind a mark.
MMVSSM_DEVICE float masked(const float* from, int count) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < POSITIONS; ++i)
    if (i < count) sum += from[i];
  return sum;
}

MMVSSM_KERNEL(marked, Args, THREADS, 1) {
  float h = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    const float* from = p.u + chunk * POSITIONS;
    const int count = p.chunks - chunk;
    float sum = 0;
    if (rarely(count < POSITIONS)) {
      sum = masked(from, count);
    } else {
#pragma unroll
      for (int i = 0; i < POSITIONS; i += 4) {
        const float4 x = *reinterpret_cast<const float4*>(from + i);
        sum += x.x + x.y + x.z + x.w;
      }
    }
    h = h * 0.5f + sum;
    p.out[chunk * THREADS + threadIdx.x] = h;
  }
}

}  // namespace mmvssm
