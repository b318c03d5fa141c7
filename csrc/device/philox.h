// Philox4x32-10 (Salmon et al., SC 2011), the random words of dropout: python/transfuse/ops/_philox.py is the contract.
#pragma once

#include <cstdint>

namespace transfuse::device {

struct Words {
  uint32_t at[4];
};

__device__ __forceinline__ Words philox(uint64_t key, Words counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = static_cast<uint64_t>(counter.at[0]) * 0xD2511F53u;
    const uint64_t high = static_cast<uint64_t>(counter.at[2]) * 0xCD9E8D57u;
    counter = {{static_cast<uint32_t>(high >> 32) ^ counter.at[1] ^ k0, static_cast<uint32_t>(high),
                static_cast<uint32_t>(low >> 32) ^ counter.at[3] ^ k1, static_cast<uint32_t>(low)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// The four words of row r's keys 4 * group .. 4 * group + 3; seed: int64 (2,) = (key, offset).
__device__ __forceinline__ Words dropout_words(const int64_t* seed, int64_t r, int group) {
  return philox(static_cast<uint64_t>(seed[0]),
                {{static_cast<uint32_t>(group), static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32),
                  static_cast<uint32_t>(seed[1])}});
}

}  // namespace transfuse::device
