// The launchers on the stand-in: they run at once, whatever the stream. Includes the kernels
// as the device's launcher does.
#include "../op_kernel/entry.cpp"

#include "../op_host/entries.h"
#include "launchers.h"

namespace megatron_replay::ascend {

using namespace ascend_sim;

void launch_restricted_fwd(void*, uint32_t blocks, Element element, const void* hidden, const void* weight,
                           const void* offsets, const void* columns, const void* gold, const void* targets, void* z,
                           void* stats, void* mixture, void* target_mixture, uint32_t positions, uint32_t width,
                           uint32_t candidates, uint32_t vocab) {
  run_restricted_fwd(PICK_1(restricted_fwd, element), blocks, element, hidden, weight, offsets, columns, gold, targets,
                     z, stats, mixture, target_mixture, positions, width, candidates, vocab);
}

void launch_restricted_bwd_dh(void*, uint32_t blocks, Element element, void* mixture, const void* weight,
                              const void* columns, const void* gold, const void* scale, const void* target_mixture,
                              uint32_t positions, uint32_t width, uint32_t candidates, uint32_t vocab) {
  run_restricted_bwd_dh(PICK_1(restricted_bwd_dh, element), blocks, element, mixture, weight, columns, gold, scale,
                        target_mixture, positions, width, candidates, vocab);
}

void launch_restricted_bwd_dw(void*, uint32_t blocks, Element element, Element grad_element, const void* hidden,
                              const void* starts, const void* touched, const void* tokens, const void* coefficient,
                              void* grad, void* parts, uint32_t positions, uint32_t width, uint32_t num_touched,
                              uint32_t entries, uint32_t vocab, bool add) {
  run_restricted_bwd_dw(PICK_2(restricted_bwd_dw, element, grad_element), blocks, element, grad_element, hidden, starts,
                        touched, tokens, coefficient, grad, parts, positions, width, num_touched, entries, vocab, add);
  run_restricted_bwd_dw_merge(PICK_1(restricted_bwd_dw_merge, grad_element), blocks, grad_element, starts, touched,
                              grad, parts, width, num_touched, entries, vocab, add);
}

void launch_logits_fwd(void*, uint32_t blocks, Element element, const void* logits, const void* offsets,
                       const void* columns, const void* gold, const void* targets, void* z, void* stats,
                       uint32_t positions, uint32_t vocab, uint32_t stride, uint32_t candidates) {
  run_logits_fwd(PICK_1(logits_fwd, element), blocks, element, logits, offsets, columns, gold, targets, z, stats,
                 positions, vocab, stride, candidates);
}

void launch_logits_bwd(void*, uint32_t blocks, Element element, const void* z, const void* offsets,
                       const void* columns, const void* gold, const void* targets, const void* peak,
                       const void* factor, const void* grad, void* grad_logits, uint32_t positions, uint32_t vocab,
                       uint32_t candidates) {
  run_logits_bwd(PICK_1(logits_bwd, element), blocks, element, z, offsets, columns, gold, targets, peak, factor, grad,
                 grad_logits, positions, vocab, candidates);
}

void launch_moclip_stats(void*, uint32_t blocks, Element grad_element, const void* grad, const void* momentum,
                         void* partial, uint64_t length) {
  run_moclip_stats(PICK_1(moclip_stats, grad_element), blocks, grad_element, grad, momentum, partial, length);
}

void launch_moclip_update(void*, uint32_t blocks, Element param_element, Element grad_element, void* param,
                          const void* grad, void* exp_avg, void* exp_avg_sq, void* rounded, void* partial,
                          uint64_t length, MoclipScalars scalars) {
  run_moclip_update(PICK_2(moclip_update, param_element, grad_element), blocks, param_element, grad_element, param,
                    grad, exp_avg, exp_avg_sq, rounded, partial, length, scalars);
}

void launch_topk(void*, uint32_t blocks, Element element, const void* logits, void* values, void* columns, void* counts,
                 void* sums, uint32_t positions, uint32_t width, uint32_t stride, uint32_t k) {
  run_topk(PICK_1(topk, element), blocks, element, logits, values, columns, counts, sums, positions, width, stride, k);
}

}  // namespace megatron_replay::ascend
