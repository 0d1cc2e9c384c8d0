// The launchers of op_host/launch.h on the stand-in, for a given kernel function: the arguments and their sizes.
#pragma once

#include "../op_host/tiling.h"
#include "run.h"

namespace ascend_sim {

using megatron_replay::ascend::bytes_of;
using megatron_replay::ascend::check_start;
using megatron_replay::ascend::Element;
using megatron_replay::ascend::MoclipScalars;

inline uint8_t* gm(const void* pointer) { return static_cast<uint8_t*>(const_cast<void*>(pointer)); }

template <class Kernel>
void run_restricted_fwd(Kernel kernel, uint32_t blocks, Element element, const void* hidden, const void* weight,
                        const void* offsets, const void* columns, const void* gold, const void* targets, void* z,
                        void* stats, void* mixture, void* target_mixture, uint32_t positions, uint32_t width,
                        uint32_t candidates, uint32_t vocab) {
  const bool soft = targets != nullptr || target_mixture != nullptr;  // of no candidates
  const auto tiling = megatron_replay::ascend::fwd_tiling(element, width, soft);
  check_start(hidden, "hidden");
  check_start(weight, "weight");
  const uint64_t n = positions, h = width, m = candidates, size = bytes_of(element);
  const std::vector<Argument> arguments = {{hidden, n * h * size, false}, {weight, vocab * h * size, false},
                                           {offsets, (n + 1) * 8, false}, {columns, m * 4, false},
                                           {gold, n * 8, false},          {targets, m * 4, false},
                                           {z, m * 4, true},              {stats, n * 12, true},
                                           {mixture, n * h * 4, true},    {target_mixture, n * h * 4, true}};
  run(blocks, arguments, [&] {
    kernel(gm(hidden), gm(weight), gm(offsets), gm(columns), gm(gold), gm(targets), gm(z), gm(stats), gm(mixture),
           gm(target_mixture), positions, width, candidates, vocab, mixture != nullptr, soft, tiling.rows, tiling.outs);
  });
}

template <class Kernel>
void run_restricted_bwd_dh(Kernel kernel, uint32_t blocks, Element element, void* mixture, const void* weight,
                           const void* columns, const void* gold, const void* scale, const void* target_mixture,
                           uint32_t positions, uint32_t width, uint32_t candidates, uint32_t vocab) {
  megatron_replay::ascend::check_width(width);
  check_start(mixture, "mixture");
  check_start(weight, "weight");
  const uint64_t n = positions, h = width;
  const std::vector<Argument> arguments = {{mixture, n * h * 4, true},
                                           {weight, vocab * h * bytes_of(element), false},
                                           {columns, candidates * 4ull, false},
                                           {gold, n * 8, false},
                                           {scale, n * 8, false},
                                           {target_mixture, n * h * 4, false}};
  run(blocks, arguments, [&] {
    kernel(gm(mixture), gm(weight), gm(columns), gm(gold), gm(scale), gm(target_mixture), positions, width, candidates,
           vocab, target_mixture != nullptr);
  });
}

template <class Kernel>
void run_restricted_bwd_dw(Kernel kernel, uint32_t blocks, Element element, Element grad_element, const void* hidden,
                           const void* starts, const void* touched, const void* tokens, const void* coefficient,
                           void* grad, void* parts, uint32_t positions, uint32_t width, uint32_t num_touched,
                           uint32_t entries, uint32_t vocab, bool add) {
  const auto tiling = megatron_replay::ascend::dw_tiling(element, grad_element, width, add);
  check_start(hidden, "hidden");
  check_start(grad, "grad");
  const uint64_t h = width, rows = add ? vocab : num_touched;
  const std::vector<Argument> arguments = {
      {hidden, positions * h * bytes_of(element), false},
      {starts, (num_touched + 1ull) * 4, false},
      {touched, num_touched * 4ull, false},
      {tokens, entries * 4ull, false},
      {coefficient, entries * 4ull, false},
      {grad, rows * h * bytes_of(grad_element), true},
      {parts, megatron_replay::ascend::restricted_bwd_dw_parts(entries) * h * 4, true}};
  run(blocks, arguments, [&] {
    kernel(gm(hidden), gm(starts), gm(touched), gm(tokens), gm(coefficient), gm(grad), gm(parts), positions, width,
           num_touched, entries, vocab, add, tiling.rows, tiling.outs);
  });
}

template <class Kernel>
void run_restricted_bwd_dw_merge(Kernel kernel, uint32_t blocks, Element grad_element, const void* starts,
                                 const void* touched, void* grad, const void* parts, uint32_t width,
                                 uint32_t num_touched, uint32_t entries, uint32_t vocab, bool add) {
  const uint64_t h = width, rows = add ? vocab : num_touched;
  const std::vector<Argument> arguments = {
      {starts, (num_touched + 1ull) * 4, false},
      {touched, num_touched * 4ull, false},
      {grad, rows * h * bytes_of(grad_element), true},
      {parts, megatron_replay::ascend::restricted_bwd_dw_parts(entries) * h * 4, false}};
  run(blocks, arguments,
      [&] { kernel(gm(starts), gm(touched), gm(grad), gm(parts), width, num_touched, entries, vocab, add); });
}

template <class Kernel>
void run_logits_fwd(Kernel kernel, uint32_t blocks, Element element, const void* logits, const void* offsets,
                    const void* columns, const void* gold, const void* targets, void* z, void* stats,
                    uint32_t positions, uint32_t vocab, uint32_t stride, uint32_t candidates) {
  const uint64_t n = positions, m = candidates, elements = n ? (n - 1) * stride + vocab : 0;
  const std::vector<Argument> arguments = {{logits, elements * bytes_of(element), false},
                                           {offsets, (n + 1) * 8, false},
                                           {columns, m * 4, false},
                                           {gold, n * 8, false},
                                           {targets, m * 4, false},
                                           {z, m * 4, true},
                                           {stats, n * 12, true}};
  run(blocks, arguments, [&] {
    kernel(gm(logits), gm(offsets), gm(columns), gm(gold), gm(targets), gm(z), gm(stats), positions, vocab, stride,
           candidates, targets != nullptr);
  });
}

template <class Kernel>
void run_logits_bwd(Kernel kernel, uint32_t blocks, Element element, const void* z, const void* offsets,
                    const void* columns, const void* gold, const void* targets, const void* peak, const void* factor,
                    const void* grad, void* grad_logits, uint32_t positions, uint32_t vocab, uint32_t candidates) {
  const uint64_t n = positions, m = candidates;
  const std::vector<Argument> arguments = {{z, m * 4, false},       {offsets, (n + 1) * 8, false},
                                           {columns, m * 4, false}, {gold, n * 8, false},
                                           {targets, m * 4, false}, {peak, n * 4, false},
                                           {factor, n * 4, false},  {grad, n * 4, false},
                                           {grad_logits, n * vocab * bytes_of(element), true}};
  run(blocks, arguments, [&] {
    kernel(gm(z), gm(offsets), gm(columns), gm(gold), gm(targets), gm(peak), gm(factor), gm(grad), gm(grad_logits),
           positions, vocab, candidates, targets != nullptr);
  });
}

template <class Kernel>
void run_moclip_stats(Kernel kernel, uint32_t blocks, Element grad_element, const void* grad, const void* momentum,
                      void* partial, uint64_t length) {
  const std::vector<Argument> arguments = {{grad, length * bytes_of(grad_element), false},
                                           {momentum, length * 4, false},
                                           {partial, megatron_replay::ascend::moclip_chunks(length) * 32, true}};
  run(blocks, arguments, [&] { kernel(gm(grad), gm(momentum), gm(partial), length, momentum != nullptr); });
}

template <class Kernel>
void run_moclip_update(Kernel kernel, uint32_t blocks, Element param_element, Element grad_element, void* param,
                       const void* grad, void* exp_avg, void* exp_avg_sq, void* rounded, void* partial, uint64_t length,
                       const MoclipScalars& s) {
  const std::vector<Argument> arguments = {{param, length * bytes_of(param_element), true},
                                           {grad, length * bytes_of(grad_element), false},
                                           {exp_avg, length * 4, true},
                                           {exp_avg_sq, length * 4, true},
                                           {rounded, length * 2, true},
                                           {partial, megatron_replay::ascend::moclip_chunks(length) * 32, true}};
  run(blocks, arguments, [&] {
    kernel(gm(param), gm(grad), gm(exp_avg), gm(exp_avg_sq), gm(rounded), gm(partial), length, rounded != nullptr,
           s.arctangent, s.m_keep, s.m_grad, s.v_grad, s.v_momentum, s.beta2, s.first, s.second, s.eps, s.keep, s.rate);
  });
}

template <class Kernel>
void run_topk(Kernel kernel, uint32_t blocks, Element element, const void* logits, void* values, void* columns,
              void* counts, void* sums, uint32_t positions, uint32_t width, uint32_t stride, uint32_t k) {
  const uint64_t n = positions, capacity = megatron_replay::ascend::topk_capacity(k),
                 elements = n ? (n - 1) * stride + width : 0;
  const std::vector<Argument> arguments = {{logits, elements * bytes_of(element), false},
                                           {values, n * capacity * 4, true},
                                           {columns, n * capacity * 4, true},
                                           {counts, n * 32, true},
                                           {sums, n * 8, true}};
  run(blocks, arguments, [&] {
    kernel(gm(logits), gm(values), gm(columns), gm(counts), gm(sums), positions, width, stride, k,
           static_cast<uint32_t>(capacity));
  });
}

}  // namespace ascend_sim
