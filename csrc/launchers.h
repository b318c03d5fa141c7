// Every launcher of the extension, with the shape of every tensor. bindings.cpp exposes each under the same name.
//
// A launcher checks what its kernel relies on, chooses tile and grid, and enqueues; it neither allocates nor waits.
// Outputs are allocated by Python and hold no meaning before the launch. An absent tensor is nullopt.
#pragma once

#include "launch.h"
#include "tensor.h"

namespace transfuse {


// y = (s - mean(s)) * rstd * weight + bias over each row, s = x + residual rounded to x's dtype (x itself without one).
void layer_norm_forward(const TensorView& x,              // (M, N), columns contiguous: float32, float16 or bfloat16
                        const OptionalTensor& residual,  // (M, N), columns contiguous, x's dtype
                        const OptionalTensor& weight,    // (N), contiguous, x's dtype or float32
                        const OptionalTensor& bias,      // (N), contiguous, weight's dtype
                        const TensorView& y,              // (M, N), columns contiguous, x's dtype
                        const OptionalTensor& summed,    // (M, N), columns contiguous, x's dtype; with a residual alone
                        const TensorView& mean,           // (M), contiguous, float32
                        const TensorView& rstd,           // (M), contiguous, float32
                        float eps, const LaunchTarget& target);

// y = s * rstd * weight over each row, as layer_norm_forward.
void rms_norm_forward(const TensorView& x, const OptionalTensor& residual, const OptionalTensor& weight,
                      const TensorView& y, const OptionalTensor& summed, const TensorView& rstd, float eps,
                      const LaunchTarget& target);

// dx, and of the weights' gradients G rows of partial sums that norm_weight_sums adds. G is the caller's choice: as many
// blocks share the rows.
void layer_norm_backward(const TensorView& dout,           // (M, N), columns contiguous, summed's dtype
                         const OptionalTensor& dsummed,  // (M, N), columns contiguous, summed's dtype
                         const TensorView& summed,        // (M, N), columns contiguous: float32, float16 or bfloat16
                         const OptionalTensor& weight,   // (N), contiguous, summed's dtype or float32
                         const TensorView& mean,          // (M), contiguous, float32
                         const TensorView& rstd,          // (M), contiguous, float32
                         const TensorView& dx,            // (M, N), columns contiguous, summed's dtype
                         const OptionalTensor& dweight,  // (G, N), contiguous, float32
                         const OptionalTensor& dbias,    // (G, N), contiguous, float32
                         const LaunchTarget& target);
void rms_norm_backward(const TensorView& dout, const OptionalTensor& dsummed, const TensorView& summed,
                       const OptionalTensor& weight, const TensorView& rstd, const TensorView& dx,
                       const OptionalTensor& dweight, const LaunchTarget& target);

// dweight = the sum of dweight_partial over its rows, dbias likewise.
void norm_weight_sums(const OptionalTensor& dweight_partial,  // (G, N), contiguous, float32
                      const OptionalTensor& dbias_partial,    // (G, N), contiguous, float32
                      const OptionalTensor& dweight,          // (N), contiguous: float32, float16 or bfloat16
                      const OptionalTensor& dbias,            // (N), contiguous, dweight's dtype
                      const LaunchTarget& target);

// softmax(scale * scores + bias) over the keys that a query sees: mask (true = seen) and key <= i + diagonal, where i is
// the index along row dimension `query` (0 if that is -1). All tensors have scores' sizes, stride 0 where broadcast.
void causal_softmax_forward(const TensorView& scores,    // (rows..., N): float32, float16 or bfloat16
                            const OptionalTensor& mask,  // (rows..., N): bool
                            const OptionalTensor& bias,  // (rows..., N): scores' dtype or float32
                            const TensorView& out,       // (rows..., N), keys contiguous, scores' dtype
                            float scale, int query, int64_t diagonal, const LaunchTarget& target);

// dlogits = out * (dout - sum(out * dout)), dscores = scale * dlogits. Rows are (groups..., members...), the first
// `group_dims` dimensions and the others; sums[c, g] adds dlogits of the members of group g from c * members_a_chunk on.
void causal_softmax_backward(const TensorView& dout,      // (rows..., N): float32, float16 or bfloat16
                             const TensorView& out,       // (rows..., N), dout's dtype
                             const TensorView& dscores,   // (rows..., N), keys contiguous, dout's dtype
                             const OptionalTensor& sums,  // (chunks, groups, N or 1), contiguous, float32 or dout's
                             int group_dims, int64_t members_a_chunk, float scale, int query, int64_t diagonal,
                             const LaunchTarget& target);

// out = softmax of the scores of q and k, times v; lse the log of the softmax's denominators. Packed rows (q_starts and
// k_starts given) come as batch 1; k_lengths says how many keys of each batch row count. docs/attention.md has the rest.
void attention_forward(const TensorView& q,    // (batch, heads, q_len, D), rows aligned to 16 bytes
                       const TensorView& k,    // (batch, kv_heads, k_len, D), likewise
                       const TensorView& v,    // (batch, kv_heads, k_len, Dv), likewise
                       const TensorView& out,  // (batch, heads, q_len, Dv), likewise
                       const TensorView& lse,  // (batch, heads, q_len, 1), float32
                       const OptionalTensor& mask,       // (batch|1, heads|1, q_len|1, k_len|1), bool
                       const OptionalTensor& bias,       // likewise, q's dtype or float32
                       const OptionalTensor& slopes,     // (batch|1, heads, 1, 1), float32
                       const OptionalTensor& sinks,      // (1, heads, 1, 1), float32
                       const OptionalTensor& q_starts,   // (batch + 1), int32
                       const OptionalTensor& k_starts,   // (batch + 1), int32
                       const OptionalTensor& k_lengths,  // (batch), int32
                       const OptionalTensor& seed,       // (2), int64; without it nothing is dropped
                       int64_t max_q, int64_t max_k, float scale,
                       int left, int right,         // -1: no limit
                       std::optional<int> first,    // none: the last query stands at the last key
                       float softcap, double dropout_p, const LaunchTarget& target);

// Gradients of attention_forward's inputs, from its arguments, its results, and the gradients of those. dbias is for a bias
// of each score's own; of any other, dbias_partial gets `splits` partial sums. What no tile of dbias, dslopes and dsinks
// covers keeps what it holds, as do rows of dq, dk and dv that belong to no sequence.
void attention_backward(const TensorView& q,    // as attention_forward's, to lse
                        const TensorView& k,
                        const TensorView& v,
                        const TensorView& out,
                        const TensorView& lse,
                        const TensorView& dout,               // like out
                        const OptionalTensor& dlse,           // like lse
                        const TensorView& statistics,         // (batch, heads, q_len, 2), float32, written
                        const TensorView& dq,                 // like q
                        const TensorView& dk,                 // like k
                        const TensorView& dv,                 // like v
                        const OptionalTensor& dbias,          // (batch, heads, q_len, k_len), bias's dtype or float32
                        const OptionalTensor& dbias_partial,  // (splits, bias's sizes), contiguous, likewise
                        const OptionalTensor& dslopes,        // (batch, heads, tiles, 1), float32: partial sums
                        const OptionalTensor& dsinks,         // likewise; tiles of 32 queries
                        const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& slopes,
                        const OptionalTensor& sinks, const OptionalTensor& q_starts, const OptionalTensor& k_starts,
                        const OptionalTensor& k_lengths, const OptionalTensor& seed, int64_t max_q, int64_t max_k,
                        float scale, int left, int right, std::optional<int> first, float softcap, double dropout_p,
                        const LaunchTarget& target);

// attention_forward for few queries: keys are split among blocks, whose results are then combined. The partial results
// are given where there are several splits, at most 128; rows = batch * heads * q_len. Rows are not packed.
void attention_decode(const TensorView& q,    // (batch, heads, q_len, D), rows aligned to 16 bytes
                      const TensorView& k,    // (batch, kv_heads, k_len, D), likewise
                      const TensorView& v,    // (batch, kv_heads, k_len, Dv), likewise
                      const TensorView& out,  // (batch, heads, q_len, Dv), likewise
                      const TensorView& lse,  // (batch, heads, q_len, 1), float32
                      const OptionalTensor& partial_out,      // (splits, rows, Dv), contiguous, float32
                      const OptionalTensor& partial_highest,  // (splits, rows), likewise
                      const OptionalTensor& partial_totals,   // (splits, rows), likewise
                      const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& slopes,
                      const OptionalTensor& sinks, const OptionalTensor& q_starts, const OptionalTensor& k_starts,
                      const OptionalTensor& k_lengths, const OptionalTensor& seed, int64_t max_q, int64_t max_k,
                      float scale, int left, int right, std::optional<int> first, float softcap, double dropout_p,
                      const LaunchTarget& target);

// The probabilities exp(score - lse) that attention_forward's lse belongs to, a sink's share left out; zero in rows whose
// lse is -inf. Without sinks, packed rows, lengths and seed.
void attention_weights(const TensorView& q,        // (batch, heads, q_len, D), rows aligned to 16 bytes
                       const TensorView& k,        // (batch, kv_heads, k_len, D), likewise
                       const TensorView& lse,      // (batch, heads, q_len, 1), float32
                       const TensorView& weights,  // (batch, heads, q_len, k_len), keys contiguous, q's dtype
                       const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& slopes,
                       const OptionalTensor& sinks, const OptionalTensor& q_starts, const OptionalTensor& k_starts,
                       const OptionalTensor& k_lengths, const OptionalTensor& seed, int64_t max_q, int64_t max_k,
                       float scale, int left, int right, std::optional<int> first, float softcap, double dropout_p,
                       const LaunchTarget& target);

// q and k turned by the angles of their positions (backwards with `inverse`), k and v written from place `start` of a
// cache on, or of a tensor of their own length. A part may be left out: without q, cos and sin it appends.
void rotary_append(const OptionalTensor& q,      // (batch, length, heads, D), k's dtype
                   const TensorView& k,          // (batch, length, kv_heads, D): float32, float16 or bfloat16
                   const OptionalTensor& v,      // (batch, length, kv_heads, Dv), k's dtype
                   const OptionalTensor& cos,    // (batch|1, length, 1, rotary_dim), k's dtype or float32
                   const OptionalTensor& sin,    // likewise
                   const OptionalTensor& q_out,  // q's shape and dtype
                   const TensorView& k_out,      // (batch, room, kv_heads, D): float32, float16 or bfloat16
                   const OptionalTensor& v_out,  // (batch, room, kv_heads, Dv), likewise
                   const OptionalTensor& starts,  // (batch), int32 or int64; without it `start` counts for all rows
                   int64_t start, bool inverse, const LaunchTarget& target);

// A product of stored matrices and its end, or its partial sums where K is split: csrc/ffn/ends.cuh has the mathematics,
// product_tiles.cuh the tiles. Stored: rows aligned to 16 bytes, whatever their width.
void ffn_product(int layout,                      // 0: C = a b^T, 1: C = a b, 2: C = a^T b
                 int tile, int splits,            // as of product_tiles.cuh; ranges of K
                 const TensorView& a,             // (M, K), of layout 2 (K, M): float32, float16 or bfloat16
                 const TensorView& b,             // (K, N), of layout 0 (N, K), a's dtype
                 const OptionalTensor& b_gate,    // like b, of layout 0
                 const OptionalTensor& a2,        // like a: C = a b + a2 b2
                 const OptionalTensor& b2,        // like b
                 const OptionalTensor& partials,  // (splits, twice where gated, M, N), float32; then no end
                 const OptionalTensor& out,       // (M, N), columns contiguous, a's dtype; up to hidden likewise
                 const OptionalTensor& bias,      // (N), contiguous, a's dtype
                 const OptionalTensor& up, const OptionalTensor& gate,  // written forward, read backward
                 const OptionalTensor& dgate, const OptionalTensor& hidden,
                 const OptionalTensor& sums,  // (tiles of M, N), contiguous, float32
                 const OptionalTensor& seed,  // (2), int64; without it nothing is dropped
                 int activation,              // 0: none, then in order of ops.ffn.ACTIVATIONS
                 bool backward, double dropout_p, const LaunchTarget& target);

// The sum over `parts` of c, beside it g, and the same end of it.
void ffn_combine(const TensorView& c,      // (parts, M, N), columns contiguous, rows aligned: float32 or out's dtype
                 const OptionalTensor& g,  // as c, strides too
                 int rows_a_block,         // each gives a row of sums
                 const OptionalTensor& out, const OptionalTensor& bias, const OptionalTensor& up,
                 const OptionalTensor& gate, const OptionalTensor& dgate, const OptionalTensor& hidden,
                 const OptionalTensor& sums, const OptionalTensor& seed, int activation, bool backward,
                 double dropout_p, const LaunchTarget& target);

}  // namespace transfuse
