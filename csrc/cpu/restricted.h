// The operators of the restricted loss and of the selection;
// megatron_replay/kernels/torch_twins.py says what they mean.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace megatron_replay {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> restricted_fwd(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& offsets, const at::Tensor& columns,
    const at::Tensor& gold, bool mix, const std::optional<at::Tensor>& targets);

void restricted_bwd_dh(at::Tensor mixture, const at::Tensor& weight, const at::Tensor& columns, const at::Tensor& gold,
                       const at::Tensor& scale, const std::optional<at::Tensor>& target_mixture);

void restricted_bwd_dw(const at::Tensor& hidden, const at::Tensor& touched, const at::Tensor& begins,
                       const at::Tensor& tokens, const at::Tensor& coefficient, at::Tensor grad_weight);

at::Tensor restricted_bwd_rows(const at::Tensor& hidden, const at::Tensor& touched, const at::Tensor& begins,
                               const at::Tensor& tokens, const at::Tensor& coefficient);

std::tuple<at::Tensor, at::Tensor> restricted_logits_fwd(const at::Tensor& logits, const at::Tensor& offsets,
                                                         const at::Tensor& columns, const at::Tensor& gold,
                                                         const std::optional<at::Tensor>& targets);

void restricted_logits_bwd(const at::Tensor& z, const at::Tensor& offsets, const at::Tensor& columns,
                           const at::Tensor& gold, const at::Tensor& scalars, at::Tensor grad_logits,
                           const std::optional<at::Tensor>& targets);

std::tuple<at::Tensor, at::Tensor, at::Tensor> topk_rows(const at::Tensor& logits, int64_t k);

}  // namespace megatron_replay
