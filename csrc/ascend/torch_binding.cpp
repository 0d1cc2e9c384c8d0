// megatron_replay._npu: importing it registers the NPU's kernels for the schemas of megatron_replay/kernels/schemas.py.
//
// torch's own NPU operators sort or transpose what a kernel wants sorted or transposed. Kernels are enqueued through
// torch-npu's OpCommand, so that they run in order with them. Sums that must be float64 are finished on the host:
// vector cores have no float64. The functions' C++ signatures are those of csrc/cpu: torch wants one for each schema.
#include <Python.h>
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "acl/acl.h"
#include "op_host/launch.h"
#include "op_host/tiling.h"
#include "torch_npu/csrc/core/npu/NPUFunctions.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace megatron_replay::ascend {
namespace {

using at::Tensor;

constexpr int64_t kPartial = 8;  // floats a chunk leaves for the host to add up, and counts of a row

Element element_of(const Tensor& tensor, const char* name) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, name, " is ", type,
              "; the NPU's kernels take float32 and bfloat16");
  return type == at::kFloat ? Element::kFloat32 : Element::kBFloat16;
}

void check(const Tensor& tensor, at::ScalarType type, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == type, name, " is ", tensor.scalar_type(), ", expected ", type);
  TORCH_CHECK(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), ", expected ", shape);
  TORCH_CHECK(tensor.is_privateuseone(), name, " lies on ", tensor.device(), ", expected an NPU");
}

uint32_t narrow(int64_t value, const char* name) {
  TORCH_CHECK(value >= 0 && value <= UINT32_MAX, name, " = ", value, " does not fit the kernel's 32 bits");
  return static_cast<uint32_t>(value);
}

// The number of the current device's vector cores, into which the work is cut.
uint32_t blocks() {
  int64_t cores = 0;
  const auto code = aclGetDeviceCapability(c10_npu::current_device(), ACL_DEVICE_INFO_VECTOR_CORE_NUM, &cores);
  TORCH_CHECK(code == ACL_SUCCESS && cores > 0,
              "the number of vector cores is unknown: aclGetDeviceCapability returned ", code);
  return static_cast<uint32_t>(cores);
}

// Enqueue `launch(stream, blocks)` on the current stream. The tensors whose memory it uses may be freed after this
// returns: the allocator hands memory on in the order of the stream.
template <typename Launch>
void enqueue(const char* name, Launch launch) {
  void* stream = c10_npu::getCurrentNPUStream().stream(false);
  const uint32_t cores = blocks();
  at_npu::native::OpCommand::RunOpApi(name, [=]() -> int {
    launch(stream, cores);
    return 0;
  });
}

// The targets of m candidates as the kernels take them; undefined where there are none.
Tensor checked_targets(const std::optional<Tensor>& targets, int64_t candidates) {
  if (!targets) return Tensor();
  check(*targets, at::kFloat, {candidates}, "targets");
  return targets->contiguous();
}

// Null for an undefined tensor.
void* data_of(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor> restricted_fwd(const Tensor& hidden, const Tensor& weight,
                                                          const Tensor& offsets, const Tensor& columns,
                                                          const Tensor& gold, bool mix,
                                                          const std::optional<Tensor>& targets) {
  const c10::DeviceGuard guard(hidden.device());
  const auto element = element_of(hidden, "hidden");
  const int64_t n = gold.numel(), m = columns.numel(), width = hidden.size(1);
  check(hidden, hidden.scalar_type(), {n, width}, "hidden");
  check(weight, hidden.scalar_type(), {weight.size(0), width}, "weight");
  check(offsets, at::kLong, {n + 1}, "offsets");
  check(columns, at::kInt, {m}, "columns");
  check(gold, at::kLong, {n}, "gold");
  const Tensor y = checked_targets(targets, m);
  const bool mix_targets = mix && targets;
  const auto floats = hidden.options().dtype(at::kFloat);
  Tensor z = at::empty({m}, floats), stats = at::empty({3, n}, floats),
         mixture = at::empty({mix ? n : 0, width}, floats),
         target_mixture = at::empty({mix_targets ? n : 0, width}, floats);
  if (n == 0) return {z, stats, mixture, target_mixture};
  check_width(narrow(width, "hidden size"));
  const Tensor h = hidden.contiguous(), w = weight.contiguous(), o = offsets.contiguous(), c = columns.contiguous(),
               g = gold.contiguous();
  const uint32_t positions = narrow(n, "positions"), columns_of = narrow(width, "hidden size"),
                 candidates = narrow(m, "candidates"), vocab = narrow(w.size(0), "vocabulary");
  const void *ph = h.data_ptr(), *pw = w.data_ptr(), *po = o.data_ptr(), *pc = c.data_ptr(), *pg = g.data_ptr(),
             *py = data_of(y);
  void *pz = z.data_ptr(), *ps = stats.data_ptr(), *pm = mix ? mixture.data_ptr() : nullptr,
       *pt = mix_targets ? target_mixture.data_ptr() : nullptr;
  enqueue("restricted_fwd", [=](void* stream, uint32_t cores) {
    launch_restricted_fwd(stream, cores, element, ph, pw, po, pc, pg, py, pz, ps, pm, pt, positions, columns_of,
                          candidates, vocab);
  });
  return {z, stats, mixture, target_mixture};
}

void restricted_bwd_dh(Tensor mixture, const Tensor& weight, const Tensor& columns, const Tensor& gold,
                       const Tensor& scale, const std::optional<Tensor>& target_mixture) {
  const c10::DeviceGuard guard(mixture.device());
  const auto element = element_of(weight, "weight");
  const int64_t n = gold.numel(), m = columns.numel(), width = weight.size(1);
  check(mixture, at::kFloat, {n, width}, "mixture");
  check(weight, weight.scalar_type(), {weight.size(0), width}, "weight");
  check(columns, at::kInt, {m}, "columns");
  check(gold, at::kLong, {n}, "gold");
  check(scale, at::kFloat, {2, n}, "scale");
  if (target_mixture) check(*target_mixture, at::kFloat, {n, width}, "target_mixture");
  TORCH_CHECK(mixture.is_contiguous(), "mixture must be contiguous: it is changed in place");
  if (n == 0) return;
  check_width(narrow(width, "hidden size"));
  const Tensor w = weight.contiguous(), c = columns.contiguous(), g = gold.contiguous(), s = scale.contiguous(),
               y = target_mixture ? target_mixture->contiguous() : Tensor();
  const uint32_t positions = narrow(n, "positions"), columns_of = narrow(width, "hidden size"),
                 candidates = narrow(m, "candidates"), vocab = narrow(w.size(0), "vocabulary");
  void* pm = mixture.data_ptr();
  const void *pw = w.data_ptr(), *pc = c.data_ptr(), *pg = g.data_ptr(), *ps = s.data_ptr(), *py = data_of(y);
  enqueue("restricted_bwd_dh", [=](void* stream, uint32_t cores) {
    launch_restricted_bwd_dh(stream, cores, element, pm, pw, pc, pg, ps, py, positions, columns_of, candidates, vocab);
  });
}

void check_entries(const Tensor& hidden, const Tensor& touched, const Tensor& begins, const Tensor& tokens,
                   const Tensor& coefficient) {
  check(hidden, hidden.scalar_type(), {hidden.size(0), hidden.size(1)}, "hidden");
  check(touched, at::kInt, {touched.numel()}, "touched");
  check(begins, at::kInt, {touched.numel() + 1}, "begins");
  check(tokens, at::kInt, {tokens.numel()}, "tokens");
  check(coefficient, at::kFloat, {tokens.numel()}, "coefficient");
}

void launch_dw(const Tensor& hidden, const Tensor& touched, const Tensor& begins, const Tensor& tokens,
               const Tensor& coefficient, const Tensor& grad, bool add) {
  const auto element = element_of(hidden, "hidden"), grad_element = element_of(grad, "the gradient of the weight");
  const int64_t n = hidden.size(0), width = hidden.size(1), entries = tokens.numel();
  check_width(narrow(width, "hidden size"));
  const Tensor h = hidden.contiguous(), v = touched.contiguous(), b = begins.contiguous(), t = tokens.contiguous(),
               c = coefficient.contiguous();
  const Tensor parts =
      at::empty({restricted_bwd_dw_parts(narrow(entries, "entries")), width}, hidden.options().dtype(at::kFloat));
  const uint32_t positions = narrow(n, "positions"), columns_of = narrow(width, "hidden size"),
                 num = narrow(v.numel(), "touched rows"), count = narrow(entries, "entries"),
                 rows = narrow(grad.size(0), "rows of the gradient");
  const void *ph = h.data_ptr(), *pb = b.data_ptr(), *pv = v.data_ptr(), *pt = t.data_ptr(), *pc = c.data_ptr();
  void *pg = grad.data_ptr(), *pp = parts.data_ptr();
  enqueue("restricted_bwd_dw", [=](void* stream, uint32_t cores) {
    launch_restricted_bwd_dw(stream, cores, element, grad_element, ph, pb, pv, pt, pc, pg, pp, positions, columns_of,
                             num, count, rows, add);
  });
}

void restricted_bwd_dw(const Tensor& hidden, const Tensor& touched, const Tensor& begins, const Tensor& tokens,
                       const Tensor& coefficient, Tensor grad) {
  const c10::DeviceGuard guard(hidden.device());
  check_entries(hidden, touched, begins, tokens, coefficient);
  check(grad, grad.scalar_type(), {grad.size(0), hidden.size(1)}, "the gradient of the weight");
  TORCH_CHECK(grad.is_contiguous(), "the gradient of the weight must be contiguous: it is changed in place");
  if (touched.numel()) launch_dw(hidden, touched, begins, tokens, coefficient, grad, /*add=*/true);
}

Tensor restricted_bwd_rows(const Tensor& hidden, const Tensor& touched, const Tensor& begins, const Tensor& tokens,
                           const Tensor& coefficient) {
  const c10::DeviceGuard guard(hidden.device());
  check_entries(hidden, touched, begins, tokens, coefficient);
  Tensor grad = at::empty({touched.numel(), hidden.size(1)}, coefficient.options());
  if (touched.numel()) launch_dw(hidden, touched, begins, tokens, coefficient, grad, /*add=*/false);
  return grad;
}

std::tuple<Tensor, Tensor> restricted_logits_fwd(const Tensor& logits, const Tensor& offsets, const Tensor& columns,
                                                 const Tensor& gold, const std::optional<Tensor>& targets) {
  const c10::DeviceGuard guard(logits.device());
  const auto element = element_of(logits, "logits");
  const int64_t n = gold.numel(), m = columns.numel();
  check(logits, logits.scalar_type(), {n, logits.size(1)}, "logits");
  check(offsets, at::kLong, {n + 1}, "offsets");
  check(columns, at::kInt, {m}, "columns");
  check(gold, at::kLong, {n}, "gold");
  const Tensor y = checked_targets(targets, m);
  const auto floats = logits.options().dtype(at::kFloat);
  Tensor z = at::empty({m}, floats), stats = at::empty({3, n}, floats);
  if (n == 0) return {z, stats};
  const Tensor x = logits.stride(1) == 1 ? logits : logits.contiguous(), o = offsets.contiguous(),
               c = columns.contiguous(), g = gold.contiguous();
  const uint32_t positions = narrow(n, "positions"), vocab = narrow(x.size(1), "columns"),
                 stride = narrow(x.stride(0), "stride"), candidates = narrow(m, "candidates");
  const void *px = x.data_ptr(), *po = o.data_ptr(), *pc = c.data_ptr(), *pg = g.data_ptr(), *py = data_of(y);
  void *pz = z.data_ptr(), *ps = stats.data_ptr();
  enqueue("restricted_logits_fwd", [=](void* stream, uint32_t cores) {
    launch_logits_fwd(stream, cores, element, px, po, pc, pg, py, pz, ps, positions, vocab, stride, candidates);
  });
  return {z, stats};
}

void restricted_logits_bwd(const Tensor& z, const Tensor& offsets, const Tensor& columns, const Tensor& gold,
                           const Tensor& scalars, Tensor grad_logits, const std::optional<Tensor>& targets) {
  const c10::DeviceGuard guard(grad_logits.device());
  const auto element = element_of(grad_logits, "the gradient of the logits");
  const int64_t n = gold.numel(), m = columns.numel();
  check(grad_logits, grad_logits.scalar_type(), {n, grad_logits.size(1)}, "the gradient of the logits");
  check(z, at::kFloat, {m}, "z");
  check(offsets, at::kLong, {n + 1}, "offsets");
  check(columns, at::kInt, {m}, "columns");
  check(gold, at::kLong, {n}, "gold");
  check(scalars, at::kFloat, {3, n}, "scalars");
  const Tensor y = checked_targets(targets, m);
  TORCH_CHECK(grad_logits.is_contiguous(), "the gradient of the logits must be contiguous: it is changed in place");
  if (m == 0) return;
  const Tensor x = z.contiguous(), o = offsets.contiguous(), c = columns.contiguous(), g = gold.contiguous(),
               s = scalars.contiguous();
  const uint32_t positions = narrow(n, "positions"), vocab = narrow(grad_logits.size(1), "columns"),
                 candidates = narrow(m, "candidates");
  const void *px = x.data_ptr(), *po = o.data_ptr(), *pc = c.data_ptr(), *pg = g.data_ptr(), *py = data_of(y);
  const float* peak = s.data_ptr<float>();
  void* out = grad_logits.data_ptr();
  enqueue("restricted_logits_bwd", [=](void* stream, uint32_t cores) {
    launch_logits_bwd(stream, cores, element, px, po, pc, pg, py, peak, peak + n, peak + 2 * n, out, positions,
                      vocab, candidates);
  });
}

// The kernel leaves more candidates than k, in no order, which two stable sorts put in order. A slot beyond what a row
// has above -inf is (-inf, 0): an id without probability, as every column of a row's rest has.
std::tuple<Tensor, Tensor, Tensor> topk_rows(const Tensor& logits, int64_t k) {
  const c10::DeviceGuard guard(logits.device());
  const auto element = element_of(logits, "logits");
  const int64_t n = logits.size(0), width = logits.size(1), kept = std::min(k, width);
  const auto floats = logits.options().dtype(at::kFloat), ints = logits.options().dtype(at::kInt);
  const auto never = -std::numeric_limits<float>::infinity();
  if (n == 0 || width == 0) {
    return {at::empty({n, kept}, floats), at::empty({n, kept}, logits.options().dtype(at::kLong)),
            at::full({n}, never, at::TensorOptions().dtype(at::kDouble)).to(logits.device())};
  }
  const Tensor x = logits.stride(1) == 1 ? logits : logits.contiguous();
  const uint32_t capacity = topk_capacity(narrow(kept, "k"));
  Tensor values = at::empty({n, capacity}, floats), columns = at::empty({n, capacity}, ints),
         counts = at::empty({n, kPartial}, ints), sums = at::empty({n, 2}, floats);
  const uint32_t positions = narrow(n, "positions"), vocab = narrow(width, "columns"),
                 stride = narrow(x.stride(0), "stride"), wanted = narrow(kept, "k");
  const void* px = x.data_ptr();
  void *pv = values.data_ptr(), *pc = columns.data_ptr(), *pn = counts.data_ptr(), *ps = sums.data_ptr();
  enqueue("topk_rows", [=](void* stream, uint32_t cores) {
    launch_topk(stream, cores, element, px, pv, pc, pn, ps, positions, vocab, stride, wanted);
  });
  const Tensor empty = at::arange(capacity, ints).unsqueeze(0).ge(counts.narrow(1, 0, 1));
  const auto [ascending, by_column] =
      at::sort(columns.masked_fill(empty, std::numeric_limits<int32_t>::max()), true, 1, false);
  const auto [best, by_value] = at::sort(values.masked_fill(empty, never).gather(1, by_column), true, 1, true);
  const Tensor top = best.narrow(1, 0, kept), none = top.eq(never);
  const Tensor ids = ascending.gather(1, by_value).narrow(1, 0, kept).masked_fill(none, 0).to(at::kLong);
  const Tensor host = sums.cpu().to(at::kDouble);
  const Tensor lse = at::log(host.select(1, 1)).add_(host.select(1, 0));
  return {top.contiguous(), ids, lse.to(logits.device())};
}

// Row i of the result: the sums over the chunks of tensor i of the partial sums' first
// `columns`, in float64 and in order.
Tensor finished(const Tensor& partial, const std::vector<int64_t>& chunks, int64_t columns) {
  const Tensor host = partial.cpu();
  const float* next = host.data_ptr<float>();
  Tensor result = at::zeros({static_cast<int64_t>(chunks.size()), columns}, at::TensorOptions().dtype(at::kDouble));
  double* row = result.data_ptr<double>();
  for (const int64_t count : chunks) {
    for (int64_t chunk = 0; chunk < count; ++chunk, next += kPartial) {
      for (int64_t column = 0; column < columns; ++column) row[column] += next[column];
    }
    row += columns;
  }
  return result;
}

// Memory for the partial sums of all tensors, and the number of chunks of each.
std::tuple<Tensor, std::vector<int64_t>> partials(at::TensorList tensors) {
  std::vector<int64_t> chunks;
  int64_t total = 0;
  for (const Tensor& tensor : tensors) {
    chunks.push_back(tensor.numel() ? static_cast<int64_t>(moclip_chunks(tensor.numel())) : 0);
    total += chunks.back();
  }
  return {at::empty({total, kPartial}, tensors[0].options().dtype(at::kFloat)), chunks};
}

void check_flat(const Tensor& tensor, const Tensor& like, const char* name) {
  TORCH_CHECK(tensor.is_privateuseone() && tensor.is_contiguous() && tensor.numel() == like.numel(), name, " of shape ",
              tensor.sizes(), " on ", tensor.device(), " must be contiguous, on the NPU and as large as its gradient ",
              like.sizes());
}

Tensor optimizer_sums(at::TensorList grads, const c10::List<std::optional<Tensor>>& momenta) {
  TORCH_CHECK(grads.size() == momenta.size() && grads.size() > 0, grads.size(), " gradients and ", momenta.size(),
              " momenta");
  const c10::DeviceGuard guard(grads[0].device());
  const auto [partial, chunks] = partials(grads);
  float* next = partial.data_ptr<float>();
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    const auto element = element_of(grad, "a gradient");
    check_flat(grad, grad, "a gradient");
    const std::optional<Tensor> momentum = momenta.get(i);
    if (momentum) {
      check_flat(*momentum, grad, "a momentum");
      TORCH_CHECK(momentum->scalar_type() == at::kFloat, "a momentum is ", momentum->scalar_type(),
                  ", expected float32");
    }
    if (chunks[i]) {
      const void *pg = grad.data_ptr(), *pm = momentum ? momentum->data_ptr() : nullptr;
      void* out = next;
      const auto length = static_cast<uint64_t>(grad.numel());
      enqueue("optimizer_sums",
              [=](void* stream, uint32_t cores) { launch_moclip_stats(stream, cores, element, pg, pm, out, length); });
    }
    next += chunks[i] * kPartial;
  }
  return finished(partial, chunks, 3);
}

MoclipScalars scalars_of(const double* row) {
  const auto f = [&](int i) { return static_cast<float>(row[i]); };
  return {f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), row[10] != 0};
}

Tensor adam_update(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                   at::TensorList rounded, const Tensor& scalars) {
  const size_t n = params.size();
  TORCH_CHECK(n > 0 && grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n &&
                  (rounded.empty() || rounded.size() == n),
              n, " parameters, ", grads.size(), " gradients, ", exp_avgs.size(), " and ", exp_avg_sqs.size(),
              " moments, ", rounded.size(), " rounded");
  const c10::DeviceGuard guard(params[0].device());
  const Tensor table = scalars.cpu().to(at::kDouble).contiguous();
  TORCH_CHECK(table.sizes() == at::IntArrayRef({static_cast<int64_t>(n), 11}), "scalars have shape ", scalars.sizes(),
              ", expected [", n, ", 11]");
  const auto [partial, chunks] = partials(grads);
  float* next = partial.data_ptr<float>();
  for (size_t i = 0; i < n; ++i) {
    const auto element = element_of(params[i], "a parameter"), grad_element = element_of(grads[i], "a gradient");
    check_flat(params[i], grads[i], "a parameter");
    check_flat(grads[i], grads[i], "a gradient");
    for (const Tensor& moment : {exp_avgs[i], exp_avg_sqs[i]}) {
      check_flat(moment, grads[i], "a moment");
      TORCH_CHECK(moment.scalar_type() == at::kFloat, "a moment is ", moment.scalar_type(), ", expected float32");
    }
    void* low = nullptr;
    if (!rounded.empty()) {
      check_flat(rounded[i], grads[i], "a rounded parameter");
      TORCH_CHECK(rounded[i].scalar_type() == at::kBFloat16 && element == Element::kFloat32,
                  "float32 parameters are rounded to bfloat16");
      low = rounded[i].data_ptr();
    }
    if (chunks[i]) {
      void *pp = params[i].data_ptr(), *pm = exp_avgs[i].data_ptr(), *pv = exp_avg_sqs[i].data_ptr(), *out = next;
      const void* pg = grads[i].data_ptr();
      const auto length = static_cast<uint64_t>(grads[i].numel());
      const MoclipScalars row = scalars_of(table.data_ptr<double>() + 11 * i);
      enqueue("adam_update", [=](void* stream, uint32_t cores) {
        launch_moclip_update(stream, cores, element, grad_element, pp, pg, pm, pv, low, out, length, row);
      });
    }
    next += chunks[i] * kPartial;
  }
  return finished(partial, chunks, 1).select(1, 0);
}

}  // namespace
}  // namespace megatron_replay::ascend

TORCH_LIBRARY_IMPL(megatron_replay, PrivateUse1, library) {
  library.impl("restricted_fwd", &megatron_replay::ascend::restricted_fwd);
  library.impl("restricted_bwd_dh", &megatron_replay::ascend::restricted_bwd_dh);
  library.impl("restricted_bwd_dw", &megatron_replay::ascend::restricted_bwd_dw);
  library.impl("restricted_bwd_rows", &megatron_replay::ascend::restricted_bwd_rows);
  library.impl("restricted_logits_fwd", &megatron_replay::ascend::restricted_logits_fwd);
  library.impl("restricted_logits_bwd", &megatron_replay::ascend::restricted_logits_bwd);
  library.impl("topk_rows", &megatron_replay::ascend::topk_rows);
  library.impl("optimizer_sums", &megatron_replay::ascend::optimizer_sums);
  library.impl("adam_update", &megatron_replay::ascend::adam_update);
}

namespace {
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_npu", "Compiled operators of megatron_replay for Ascend NPUs.", -1,
                      nullptr};
}

PyMODINIT_FUNC PyInit__npu() { return PyModule_Create(&module); }
