// The two operators of the optimizers; megatron_replay/kernels/tensor_updates.py says what they mean.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

namespace megatron_replay {

at::Tensor optimizer_sums(at::TensorList grads, const c10::List<std::optional<at::Tensor>>& momenta);

at::Tensor adam_update(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                       at::TensorList rounded, const at::Tensor& scalars);

}  // namespace megatron_replay
