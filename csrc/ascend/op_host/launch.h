// The launchers, by which the host starts the kernels: one function for each. op_kernel/launch_npu.cpp implements them
// on a device, sim/launch.cpp on the host stand-in. N positions, H hidden, V vocabulary rows here, m candidates here.
// Matrices are row-major with rows side by side, unless a stride is given; their rows begin at multiples of 32 bytes.
// Every launcher computes its own tiling (tiling.h) and throws std::invalid_argument for shapes the kernel does not
// take. `blocks` is the number of vector cores to use; no result depends on it.
#pragma once

#include <cstdint>

namespace megatron_replay::ascend {

enum class Element : uint32_t { kFloat32 = 0, kBFloat16 = 1 };

// z [m] float32; stats [3, N] float32: (max, sum exp(z - max), sum y z), (-3e38, 0, 0) for a position without
// candidates; mixture [N, H] float32, or null: sum over the candidates j of t of exp(z_tj - max_t) W[j]; target_mixture
// [N, H] float32, where there are both a mixture and targets: sum of y_tj W[j].
// hidden [N, H], weight [V, H] of `element`; offsets [N + 1] int64; columns [m] int32; gold [N]
// int64: index into columns or -1; targets y [m] float32, or null: 1 at gold, 0 elsewhere.
void launch_restricted_fwd(void* stream, uint32_t blocks, Element element, const void* hidden, const void* weight,
                           const void* offsets, const void* columns, const void* gold, const void* targets, void* z,
                           void* stats, void* mixture, void* target_mixture, uint32_t positions, uint32_t width,
                           uint32_t candidates, uint32_t vocab);

// mixture[t] <- scale[0, t] mixture[t] - scale[1, t] target_mixture[t]; where that is null, W[columns[gold[t]]] takes
// its place where gold[t] >= 0. Both mixtures [N, H], scale [2, N] float32.
void launch_restricted_bwd_dh(void* stream, uint32_t blocks, Element element, void* mixture, const void* weight,
                              const void* columns, const void* gold, const void* scale, const void* target_mixture,
                              uint32_t positions, uint32_t width, uint32_t candidates, uint32_t vocab);

// The entries of the candidate lists sorted by column (stable): touched [U] int32 the columns that occur,
// ascending; starts [U + 1] int32 where each begins; tokens [m] int32 the position and coefficient [m]
// float32 the factor of each entry.
// add: grad[touched[u]] += row u of the gradient, grad [V, H] of `grad_element`;
// otherwise grad[u] = row u, grad [U, H].
// parts: float32 workspace of restricted_bwd_dw_parts(entries) rows of H; rows of more than 64 entries
// are summed there in parts of 64.
uint32_t restricted_bwd_dw_parts(uint32_t entries);
void launch_restricted_bwd_dw(void* stream, uint32_t blocks, Element element, Element grad_element, const void* hidden,
                              const void* starts, const void* touched, const void* tokens, const void* coefficient,
                              void* grad, void* parts, uint32_t positions, uint32_t width, uint32_t num_touched,
                              uint32_t entries, uint32_t vocab, bool add);

// The restricted loss from logits [N, V] of `element`, rows `stride` elements apart: z and
// stats as restricted_fwd gives them.
void launch_logits_fwd(void* stream, uint32_t blocks, Element element, const void* logits, const void* offsets,
                       const void* columns, const void* gold, const void* targets, void* z, void* stats,
                       uint32_t positions, uint32_t vocab, uint32_t stride, uint32_t candidates);

// grad_logits[t, j] = factor[t] exp(z_tj - peak[t]) - y_tj grad[t] for the candidates j of t; the rest of
// grad_logits [N, V] is left as it is. Targets y as in restricted_fwd; peak, factor (grad / sum exp of the whole set),
// grad [N] float32.
void launch_logits_bwd(void* stream, uint32_t blocks, Element element, const void* z, const void* offsets,
                       const void* columns, const void* gold, const void* targets, const void* peak,
                       const void* factor, const void* grad, void* grad_logits, uint32_t positions, uint32_t vocab,
                       uint32_t candidates);

// partial [moclip_chunks(length), 8] float32: (sum m g, sum m^2, sum g^2, 0...) of each chunk; add
// them up in float64 and in order.
// grad [length] of `grad_element`; momentum [length] float32, or null: then the first two are 0.
uint64_t moclip_chunks(uint64_t length);
void launch_moclip_stats(void* stream, uint32_t blocks, Element grad_element, const void* grad, const void* momentum,
                         void* partial, uint64_t length);

// The update that megatron_replay/kernels/tensor_updates.py calls `Scalars`, in the same order.
struct MoclipScalars {
  float m_keep, m_grad, v_grad, v_momentum, beta2, first, second, eps, keep, rate;
  bool arctangent;
};

// m <- m_keep m + m_grad g;  v <- beta2 v + (v_grad g + v_momentum m)^2 with the m before;
// u = atan2(first m, sqrt v) if arctangent else first m / (second sqrt v + eps);  param <- keep param - rate u;
// rounded (or null) <- bf16 param.
// partial [moclip_chunks(length), 8] float32: (sum u^2, 0...) of each chunk.
void launch_moclip_update(void* stream, uint32_t blocks, Element param_element, Element grad_element, void* param,
                          const void* grad, void* exp_avg, void* exp_avg_sq, void* rounded, void* partial,
                          uint64_t length, MoclipScalars scalars);

// Candidates for the k largest of each row of logits [N, C], rows `stride` elements apart: values [N, topk_capacity(k)]
// float32, columns int32, and counts [N, 8] int32, the count in every place. Every one of the k first by (value
// descending, column ascending) whose value is above -inf is among the first counts[t][0] of row t, in no order; empty
// slots between them hold (-inf, -1). sums [N, 2] float32: (max, sum exp(x - max)) of the row, (-3e38, 0) for a row of
// -inf. k is 1 to 2,048.
uint32_t topk_capacity(uint32_t k);
void launch_topk(void* stream, uint32_t blocks, Element element, const void* logits, void* values, void* columns,
                 void* counts, void* sums, uint32_t positions, uint32_t width, uint32_t stride, uint32_t k);

}  // namespace megatron_replay::ascend
