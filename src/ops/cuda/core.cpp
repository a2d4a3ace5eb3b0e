// selected_attention on the device: q, k, v are read where they lie.
#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>

#include <cmath>

#include "headwise/backends.h"
#include "kernels/cuda/decode.h"
#include "ops/cuda/arguments.h"
#include "ops/cuda/flash.h"
#include "ops/cuda/launch.h"
#include "ops/cuda/selected.h"
#include "ops/select_heads.h"

namespace headwise::ops::device {
namespace {

using at::Tensor;

/// Everything that forward and backward share; holds the tensors that the arguments point to.
struct Core {
  Tensor q, k, v, weight, index, count;
  bool decodes;  ///< the forward by decode.h, which reads the index as it is
  bool flash;    ///< the forward by flash.h
  Selected selected;
  Masks masks;
  PairAttentionArguments a{};

  Core(const CoreInputs& in, bool forward)
      : q(dense_rows(in.q)),
        k(dense_rows(in.k)),
        v(dense_rows(in.v)),
        decodes(forward && q.size(2) == 1 && q.size(1) > 0 && in.arguments.dropout_p == 0),
        flash(forward && !decodes && takes_flash(in)),
        selected(decodes ? Selected{}
                         : select(in.index, in.count, q.size(1), flash ? k.size(2) : 0)),
        masks(in.arguments, q.scalar_type(), q.device(), q.size(0), q.size(1), q.size(2),
              k.size(2)) {
    masks.apply(a);
    a.type = element_of(q.scalar_type());
    a.chosen = selected.chosen;
    if (decodes) {
      index = narrowed(in.index).contiguous(), count = narrowed(in.count).contiguous();
      a.chosen = {q.size(0),
                  index.size(1),
                  q.size(1),
                  index.const_data_ptr<int32_t>(),
                  count.const_data_ptr<int32_t>(),
                  nullptr,
                  nullptr,
                  nullptr};
    }
    a.packed = false;
    a.group = k.size(1) ? q.size(1) / k.size(1) : 1;
    a.queries = q.size(2), a.keys = k.size(2), a.added = 0;
    a.width = q.size(3), a.value_width = v.size(3);
    a.scale = in.arguments.scale.value_or(a.width ? 1 / std::sqrt(double(a.width)) : 1.0);
    a.q = units(q), a.k = units(k), a.v = units(v);
    a.vectors = aligned(q) && aligned(k) && aligned(v);
    if (in.weight) {
      weight = in.weight->to(lse_type(q.scalar_type())).contiguous();  // [B, H]
      a.weight = weight.const_data_ptr();
    }
  }

  /// Whether heads lie one after another, at addresses that LibTorch's kernel, which does not check
  /// them, can read 16 bytes at a time; a decoding step has its own kernel.
  bool takes_flash(const CoreInputs& in) const {
    const auto& arguments = in.arguments;
    const int64_t L = q.size(2), S = k.size(2);
    return L > 1 && S > 0 && !arguments.key_padding_mask && !arguments.attn_mask &&
           arguments.dropout_p == 0 && (!arguments.is_causal || L == S) && q.is_contiguous() &&
           k.is_contiguous() && v.is_contiguous() && aligned(q) && aligned(k) && aligned(v) &&
           q.size(3) == v.size(3) &&
           flash_takes(q.scalar_type(), q.size(0) * q.size(1), std::max(L, S), q.size(3)) &&
           cuda_routes().attention == CudaAttention::flash;
  }

  /// Every (sequence, head) pair is a sequence of flash.h; those not chosen use no key, for which
  /// it writes zeros and computes nothing. -> context [B, H, L, d], lse [B, H, L]
  std::tuple<Tensor, Tensor> flash_attention() const {
    const int64_t B = q.size(0), H = q.size(1), L = q.size(2), S = k.size(2);
    const auto rows = [](const Tensor& t) { return t.view({-1, 1, t.size(3)}); };
    const auto pairs = at::arange(B * H + 1, selected.lists.options());
    const auto begins = pairs * L;  // [B H + 1]
    // The heads of a group begin at the same keys.
    const auto begins_k = a.group == 1 && L == S ? begins : pairs.floor_divide(a.group) * S;
    auto [context, lse] = flash_forward(rows(q), rows(k), rows(v),
                                        {begins, begins_k, L, S, a.causal, a.scale}, selected.used);
    return {context.view(q.sizes()), lse.view({B, H, L})};
  }
};

}  // namespace

std::string refusal(const CoreInputs& in) {
  const int64_t widest = std::max(in.q.size(3), in.v.size(3));
  if (widest > kernels::cuda::kWidestHead)
    return c10::str("heads of ", widest, " columns: the kernels take at most ",
                    kernels::cuda::kWidestHead);
  return "";
}

CoreForward forward(const CoreInputs& in) {
  check_inputs(in);
  const DeviceGuard guard(in.q.device());
  Core core(in, /*forward=*/true);
  auto& a = core.a;
  const auto& q = core.q;
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2);
  if (core.flash) {
    const auto [context, lse] = core.flash_attention();
    if (!in.weight) return {context, at::empty({0}, q.options()), lse};
    return {(context * core.weight.unsqueeze(2).unsqueeze(3)).to(q.scalar_type()), context, lse};
  }
  auto output = at::zeros({B, H, L, a.value_width}, q.options());
  auto context = in.weight ? at::empty_like(output) : at::empty({0}, q.options());
  auto lse = at::empty({B, H, L}, q.options().dtype(lse_type(q.scalar_type())));
  a.context = units(in.weight ? context : output);
  if (in.weight) a.weighted = units(output);
  a.lse = lse.mutable_data_ptr();
  if (core.decodes) {
    // Enough splits of the keys to fill a device of any size, even if few heads are chosen.
    constexpr int64_t kBlocks = 1024;
    const auto shape = kernels::cuda::decode_shape(B, H / a.group, a.keys, kBlocks);
    auto partial = at::empty({kernels::cuda::decode_scratch(a, shape)}, lse.options());
    check_launch(kernels::cuda::decode(a, shape, partial.mutable_data_ptr(), current_stream()));
  } else {
    check_launch(kernels::cuda::attention_forward(a, current_stream()));
  }
  return {output, context, lse};
}

CoreBackward backward(const Tensor& grad_output, const CoreInputs& in, const Tensor& output,
                      const Tensor& context, const Tensor& lse, const Needs<5>& needs) {
  const DeviceGuard guard(in.q.device());
  Core core(in, /*forward=*/false);
  auto& a = core.a;
  const auto& q = core.q;
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), S = a.keys;
  const auto none = [&] { return at::empty({0}, q.options()); };
  const auto options = q.options().dtype(lse_type(q.scalar_type()));
  const auto grad = dense_rows(grad_output);
  a.grad_context = units(grad), a.context = units(in.weight ? context : output);
  a.vectors = a.vectors && aligned(grad);
  auto delta = at::empty({B, H, L}, options);
  const bool wants_weight = in.weight && needs[3];
  auto grad_weight = wants_weight ? at::zeros({B, H}, options) : Tensor();
  a.context_vectors = aligned(grad) && aligned(in.weight ? context : output);
  check_launch(kernels::cuda::attention_delta(
      a, delta.mutable_data_ptr(), wants_weight ? grad_weight.mutable_data_ptr() : nullptr, false,
      current_stream()));
  auto grad_q = at::zeros({B, H, L, a.width}, q.options());
  auto grad_k = at::zeros({B, H, S, a.width}, q.options());
  auto grad_v = at::zeros({B, H, S, a.value_width}, q.options());
  auto grad_mask = needs[4] ? at::zeros({B, H, L, S}, options) : Tensor();
  a.lse = lse.mutable_data_ptr(), a.delta = delta.const_data_ptr();
  a.grad_q = units(grad_q), a.grad_k = units(grad_k), a.grad_v = units(grad_v);
  if (needs[4]) a.grad_mask = grad_mask.mutable_data_ptr();
  if (needs[0] || needs[1] || needs[2] || needs[4])
    check_launch(kernels::cuda::attention_backward(a, current_stream()));
  const auto shared = [&](const Tensor& of_heads) {  // sums over the heads of a group
    if (a.group == 1) return of_heads;
    return of_heads.unflatten(1, {in.k.size(1), a.group})
        .sum(2, false, options.dtype().toScalarType())
        .to(q.scalar_type());
  };
  return {needs[0] ? grad_q : none(), needs[1] ? shared(grad_k) : none(),
          needs[2] ? shared(grad_v) : none(),
          wants_weight ? grad_weight.to(in.weight->scalar_type()) : none(),
          needs[4] ? at::sum_to(grad_mask, in.arguments.attn_mask->sizes())
                         .to(in.arguments.attn_mask->scalar_type())
                   : none()};
}

}  // namespace headwise::ops::device
