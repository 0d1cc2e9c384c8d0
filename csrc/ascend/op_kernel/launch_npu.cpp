// The launchers on a device. Kernels and their launches are one translation unit, as the AscendC compiler wants it.
#include "entry.cpp"

#include "../op_host/entries.h"
#include "../op_host/tiling.h"

namespace megatron_replay::ascend {

namespace {

uint8_t* gm(const void* pointer) { return static_cast<uint8_t*>(const_cast<void*>(pointer)); }

}  // namespace

// <<<>>> takes the name of a kernel, not a pointer to it.
#define LAUNCH_1(NAME, E, ...)                                \
  if ((E) == Element::kFloat32) {                             \
    NAME##_f32<<<blocks, nullptr, stream>>>(__VA_ARGS__);     \
  } else {                                                    \
    NAME##_bf16<<<blocks, nullptr, stream>>>(__VA_ARGS__);    \
  }
#define LAUNCH_2(NAME, E, F, ...)                \
  if ((E) == Element::kFloat32) {                \
    LAUNCH_1(NAME##_f32, F, __VA_ARGS__)         \
  } else {                                       \
    LAUNCH_1(NAME##_bf16, F, __VA_ARGS__)        \
  }

void launch_restricted_fwd(void* stream, uint32_t blocks, Element element, const void* hidden, const void* weight,
                           const void* offsets, const void* columns, const void* gold, const void* targets, void* z,
                           void* stats, void* mixture, void* target_mixture, uint32_t positions, uint32_t width,
                           uint32_t candidates, uint32_t vocab) {
  const uint32_t mix = mixture != nullptr, soft = targets != nullptr || target_mixture != nullptr;  // of no candidates
  const FwdTiling tiling = fwd_tiling(element, width, soft);
  check_start(hidden, "hidden");
  check_start(weight, "weight");
  LAUNCH_1(restricted_fwd, element, gm(hidden), gm(weight), gm(offsets), gm(columns), gm(gold), gm(targets), gm(z),
           gm(stats), gm(mixture), gm(target_mixture), positions, width, candidates, vocab, mix, soft, tiling.rows,
           tiling.outs)
}

void launch_restricted_bwd_dh(void* stream, uint32_t blocks, Element element, void* mixture, const void* weight,
                              const void* columns, const void* gold, const void* scale, const void* target_mixture,
                              uint32_t positions, uint32_t width, uint32_t candidates, uint32_t vocab) {
  check_width(width);
  check_start(mixture, "mixture");
  check_start(weight, "weight");
  const uint32_t soft = target_mixture != nullptr;
  LAUNCH_1(restricted_bwd_dh, element, gm(mixture), gm(weight), gm(columns), gm(gold), gm(scale), gm(target_mixture),
           positions, width, candidates, vocab, soft)
}

void launch_restricted_bwd_dw(void* stream, uint32_t blocks, Element element, Element grad_element, const void* hidden,
                              const void* starts, const void* touched, const void* tokens, const void* coefficient,
                              void* grad, void* parts, uint32_t positions, uint32_t width, uint32_t num_touched,
                              uint32_t entries, uint32_t vocab, bool add) {
  const DwTiling tiling = dw_tiling(element, grad_element, width, add);
  const uint32_t into = add;
  check_start(hidden, "hidden");
  check_start(grad, "grad");
  LAUNCH_2(restricted_bwd_dw, element, grad_element, gm(hidden), gm(starts), gm(touched), gm(tokens), gm(coefficient),
           gm(grad), gm(parts), positions, width, num_touched, entries, vocab, into, tiling.rows, tiling.outs)
  LAUNCH_1(restricted_bwd_dw_merge, grad_element, gm(starts), gm(touched), gm(grad), gm(parts), width, num_touched,
           entries, vocab, into)
}

void launch_logits_fwd(void* stream, uint32_t blocks, Element element, const void* logits, const void* offsets,
                       const void* columns, const void* gold, const void* targets, void* z, void* stats,
                       uint32_t positions, uint32_t vocab, uint32_t stride, uint32_t candidates) {
  const uint32_t soft = targets != nullptr;
  LAUNCH_1(logits_fwd, element, gm(logits), gm(offsets), gm(columns), gm(gold), gm(targets), gm(z), gm(stats),
           positions, vocab, stride, candidates, soft)
}

void launch_logits_bwd(void* stream, uint32_t blocks, Element element, const void* z, const void* offsets,
                       const void* columns, const void* gold, const void* targets, const void* peak,
                       const void* factor, const void* grad, void* grad_logits, uint32_t positions, uint32_t vocab,
                       uint32_t candidates) {
  const uint32_t soft = targets != nullptr;
  LAUNCH_1(logits_bwd, element, gm(z), gm(offsets), gm(columns), gm(gold), gm(targets), gm(peak), gm(factor), gm(grad),
           gm(grad_logits), positions, vocab, candidates, soft)
}

void launch_moclip_stats(void* stream, uint32_t blocks, Element grad_element, const void* grad, const void* momentum,
                         void* partial, uint64_t length) {
  const uint32_t has_momentum = momentum != nullptr;
  LAUNCH_1(moclip_stats, grad_element, gm(grad), gm(momentum), gm(partial), length, has_momentum)
}

void launch_moclip_update(void* stream, uint32_t blocks, Element param_element, Element grad_element, void* param,
                          const void* grad, void* exp_avg, void* exp_avg_sq, void* rounded, void* partial,
                          uint64_t length, MoclipScalars s) {
  const uint32_t round = rounded != nullptr, arctangent = s.arctangent;
  LAUNCH_2(moclip_update, param_element, grad_element, gm(param), gm(grad), gm(exp_avg), gm(exp_avg_sq), gm(rounded),
           gm(partial), length, round, arctangent, s.m_keep, s.m_grad, s.v_grad, s.v_momentum, s.beta2, s.first,
           s.second, s.eps, s.keep, s.rate)
}

void launch_topk(void* stream, uint32_t blocks, Element element, const void* logits, void* values, void* columns,
                 void* counts, void* sums, uint32_t positions, uint32_t width, uint32_t stride, uint32_t k) {
  const uint32_t capacity = topk_capacity(k);
  LAUNCH_1(topk, element, gm(logits), gm(values), gm(columns), gm(counts), gm(sums), positions, width, stride, k,
           capacity)
}

}  // namespace megatron_replay::ascend
