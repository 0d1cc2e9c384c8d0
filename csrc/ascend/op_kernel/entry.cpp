// The kernels' entry points, for vector cores only. Arguments are pointers into global memory and numbers by value. A
// name ends with the element types, in the order in which the launcher (op_host/launch.h) takes them.
#include "logits_bwd.h"
#include "logits_fwd.h"
#include "moclip_stats.h"
#include "moclip_update.h"
#include "restricted_bwd_dh.h"
#include "restricted_bwd_dw.h"
#include "restricted_fwd.h"
#include "topk.h"

namespace ours = megatron_replay::ascend;

#define ENTRY extern "C" __global__ __aicore__ void

#define RESTRICTED_FWD(SUFFIX, T)                                                                                    \
  ENTRY restricted_fwd_##SUFFIX(GM_ADDR hidden, GM_ADDR weight, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold, \
                                GM_ADDR targets, GM_ADDR z, GM_ADDR stats, GM_ADDR mixture,                     \
                                GM_ADDR target_mixture, uint32_t positions, uint32_t width,                     \
                                uint32_t candidates, uint32_t vocab, uint32_t mix, uint32_t soft,               \
                                uint32_t rows, uint32_t outs) {                                                 \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                             \
    ours::restricted_fwd<T>(hidden, weight, offsets, columns, gold, targets, z, stats, mixture, target_mixture, \
                            positions, width, candidates, vocab, mix, soft, rows, outs);                        \
  }
RESTRICTED_FWD(f32, float)
RESTRICTED_FWD(bf16, bfloat16_t)

#define RESTRICTED_BWD_DH(SUFFIX, T)                                                                              \
  ENTRY restricted_bwd_dh_##SUFFIX(GM_ADDR mixture, GM_ADDR weight, GM_ADDR columns, GM_ADDR gold, GM_ADDR scale,     \
                                   GM_ADDR target_mixture, uint32_t positions, uint32_t width, uint32_t candidates,   \
                                   uint32_t vocab, uint32_t soft) {                                                   \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                   \
    ours::restricted_bwd_dh<T>(mixture, weight, columns, gold, scale, target_mixture, positions, width, candidates, \
                               vocab, soft);                                                                          \
  }
RESTRICTED_BWD_DH(f32, float)
RESTRICTED_BWD_DH(bf16, bfloat16_t)

#define RESTRICTED_BWD_DW(SUFFIX, T, G)                                                                        \
  ENTRY restricted_bwd_dw_##SUFFIX(GM_ADDR hidden, GM_ADDR starts, GM_ADDR touched, GM_ADDR tokens,            \
                                   GM_ADDR coefficient, GM_ADDR grad, GM_ADDR parts, uint32_t positions,       \
                                   uint32_t width, uint32_t num_touched, uint32_t entries, uint32_t vocab,     \
                                   uint32_t add, uint32_t rows, uint32_t outs) {                               \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                            \
    ours::restricted_bwd_dw<T, G>(hidden, starts, touched, tokens, coefficient, grad, parts, positions, width, \
                                  num_touched, entries, vocab, add, rows, outs);                               \
  }
RESTRICTED_BWD_DW(f32_f32, float, float)
RESTRICTED_BWD_DW(f32_bf16, float, bfloat16_t)
RESTRICTED_BWD_DW(bf16_f32, bfloat16_t, float)
RESTRICTED_BWD_DW(bf16_bf16, bfloat16_t, bfloat16_t)

#define RESTRICTED_BWD_DW_MERGE(SUFFIX, G)                                                                             \
  ENTRY restricted_bwd_dw_merge_##SUFFIX(GM_ADDR starts, GM_ADDR touched, GM_ADDR grad, GM_ADDR parts, uint32_t width, \
                                         uint32_t num_touched, uint32_t entries, uint32_t vocab, uint32_t add) {       \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                    \
    ours::restricted_bwd_dw_merge<G>(starts, touched, grad, parts, width, num_touched, entries, vocab, add);           \
  }
RESTRICTED_BWD_DW_MERGE(f32, float)
RESTRICTED_BWD_DW_MERGE(bf16, bfloat16_t)

#define LOGITS_FWD(SUFFIX, T)                                                                                         \
  ENTRY logits_fwd_##SUFFIX(GM_ADDR logits, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold, GM_ADDR targets,          \
                            GM_ADDR z, GM_ADDR stats, uint32_t positions, uint32_t vocab, uint32_t stride,            \
                            uint32_t candidates, uint32_t soft) {                                                     \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                   \
    ours::logits_fwd<T>(logits, offsets, columns, gold, targets, z, stats, positions, vocab, stride, candidates,      \
                        soft);                                                                                        \
  }
LOGITS_FWD(f32, float)
LOGITS_FWD(bf16, bfloat16_t)

#define LOGITS_BWD(SUFFIX, T)                                                                                        \
  ENTRY logits_bwd_##SUFFIX(GM_ADDR z, GM_ADDR offsets, GM_ADDR columns, GM_ADDR gold, GM_ADDR targets,               \
                            GM_ADDR peak, GM_ADDR factor, GM_ADDR grad, GM_ADDR grad_logits, uint32_t positions,      \
                            uint32_t vocab, uint32_t candidates, uint32_t soft) {                                     \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                   \
    ours::logits_bwd<T>(z, offsets, columns, gold, targets, peak, factor, grad, grad_logits, positions, vocab,        \
                        candidates, soft);                                                                            \
  }
LOGITS_BWD(f32, float)
LOGITS_BWD(bf16, bfloat16_t)

#define MOCLIP_STATS(SUFFIX, G)                                                                 \
  ENTRY moclip_stats_##SUFFIX(GM_ADDR grad, GM_ADDR momentum, GM_ADDR partial, uint64_t length, \
                              uint32_t has_momentum) {                                          \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                             \
    ours::moclip_stats<G>(grad, momentum, partial, length, has_momentum);                       \
  }
MOCLIP_STATS(f32, float)
MOCLIP_STATS(bf16, bfloat16_t)

#define MOCLIP_UPDATE(SUFFIX, P, G)                                                                                  \
  ENTRY moclip_update_##SUFFIX(GM_ADDR param, GM_ADDR grad, GM_ADDR exp_avg, GM_ADDR exp_avg_sq, GM_ADDR rounded,    \
                               GM_ADDR partial, uint64_t length, uint32_t round, uint32_t arctangent, float m_keep,  \
                               float m_grad, float v_grad, float v_momentum, float beta2, float first, float second, \
                               float eps, float keep, float rate) {                                                  \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                  \
    ours::moclip_update<P, G>(param, grad, exp_avg, exp_avg_sq, rounded, partial, length, round, arctangent, m_keep, \
                              m_grad, v_grad, v_momentum, beta2, first, second, eps, keep, rate);                    \
  }
MOCLIP_UPDATE(f32_f32, float, float)
MOCLIP_UPDATE(f32_bf16, float, bfloat16_t)
MOCLIP_UPDATE(bf16_f32, bfloat16_t, float)
MOCLIP_UPDATE(bf16_bf16, bfloat16_t, bfloat16_t)

#define TOPK(SUFFIX, T)                                                                                     \
  ENTRY topk_##SUFFIX(GM_ADDR logits, GM_ADDR values, GM_ADDR columns, GM_ADDR counts, GM_ADDR sums,        \
                      uint32_t positions, uint32_t width, uint32_t stride, uint32_t k, uint32_t capacity) { \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                         \
    ours::topk<T>(logits, values, columns, counts, sums, positions, width, stride, k, capacity);            \
  }
TOPK(f32, float)
TOPK(bf16, bfloat16_t)
