// CPU kernels of the operators that run a whole layer: tensors in, raw pointers to src/kernels/cpu.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "kernels/cpu/layer.h"
#include "ops/backward_checks.h"
#include "ops/cpu/layer_call.h"
#include "ops/input_tensors.h"

namespace headwise::ops {
namespace {

using at::Tensor;

template <typename T, typename Acc>
bool runs_packed(const kernels::Layer<T, Acc>& layer) {
  if constexpr (!std::is_same_v<T, double>)
    return kernels::packed_layer_supported(layer);
  else
    return false;
}

template <typename T, typename Acc>
void run_layer(const kernels::Layer<T, Acc>& layer, bool packed,
               const kernels::LayerWorkspace<T, Acc>& workspace, T* output) {
  if constexpr (!std::is_same_v<T, double>)
    if (packed) return kernels::layer_forward_packed(layer, workspace, output);
  if constexpr (std::is_same_v<T, Acc>) kernels::layer_forward(layer, workspace, output);
}

/// Output and workspaces; with `compact` (no backward follows) the workspaces are only as large as
/// what was chosen, and those that the kernel does not need are left out.
template <typename T, typename Acc>
LayerForward run_call(const LayerCall<T, Acc>& call, const Tensor& like, bool compact) {
  const auto& s = call.layer.shape;
  const auto options = like.options().dtype(scalar_type_of<T>());
  auto output = at::empty({s.batch, s.queries, call.layer.out_width}, options);
  auto buffer = [&](int64_t rows, int64_t width, at::ScalarType type) {
    return compact
               ? at::empty({int64_t(call.layer.active.size()), rows, width}, options.dtype(type))
               : at::empty({s.batch, call.columns, rows, width}, options.dtype(type));
  };
  const auto type = scalar_type_of<T>();
  const bool packed = runs_packed(call.layer);
  auto context = buffer(s.queries, s.width, type);
  kernels::LayerWorkspace<T, Acc> workspace{};
  workspace.context = context.template mutable_data_ptr<T>();
  Tensor q, k, v, lse;
  if (!(packed && compact)) {
    q = buffer(s.queries, s.width, type);
    k = buffer(s.keys + s.added, s.width, type), v = at::empty_like(k);
    lse = buffer(s.queries, 1, scalar_type_of<Acc>()).squeeze(-1);
    workspace.q = q.template mutable_data_ptr<T>(), workspace.k = k.template mutable_data_ptr<T>();
    workspace.v = v.template mutable_data_ptr<T>();
    workspace.lse = lse.template mutable_data_ptr<Acc>();
  }
  run_layer<T, Acc>(call.layer, packed, workspace, output.template mutable_data_ptr<T>());
  const auto result = like.scalar_type();
  if (compact) return {output.to(result), {}, {}, {}, {}, {}};
  return {output.to(result), q.to(result), k.to(result), v.to(result), context.to(result), lse};
}

template <typename Inputs>
LayerForward run(const Inputs& in, const Tensor& like, bool compact) {
  check_inputs(in);
  if (like.scalar_type() == at::kBFloat16) {
    const LayerCall<at::BFloat16, float> call(in, compact);
    if (kernels::packed_layer_supported(call.layer)) return run_call(call, like, compact);
  }
  return dispatch(like.scalar_type(), [&]<typename T>(T) -> LayerForward {
    return run_call(LayerCall<T>(in, compact), like, compact);
  });
}

/// f(call) in the type in which forward ran, so that what it saved is read as it is.
template <typename Inputs, typename F>
auto with_backward_call(const Inputs& in, const Tensor& like, const LayerSaved& saved, const F& f) {
  if (saved.q.scalar_type() == at::kBFloat16) {
    LayerCall<at::BFloat16, float> call(in, false);
    if (kernels::packed_layer_supported(call.layer)) return f(call);
  }
  return dispatch(like.scalar_type(), [&]<typename T>(T) {
    LayerCall<T> call(in, false);
    return f(call);
  });
}

template <typename T, typename Acc>
void run_backward(LayerCall<T, Acc>& call, const LayerSaved& saved, const Tensor& grad_output,
                  const kernels::LayerGradients<T, Acc>& gradients) {
  const auto workspace = call.workspace(saved);
  const auto grad = grad_output.to(scalar_type_of<T>()).contiguous();
  const T* data = grad.template const_data_ptr<T>();
  if constexpr (!std::is_same_v<T, double>)
    if (runs_packed(call.layer))
      return kernels::layer_backward_packed<T>(call.layer, workspace, data, gradients);
  if constexpr (std::is_same_v<T, Acc>)
    kernels::layer_backward<T>(call.layer, workspace, data, gradients);
}

LayerForward self_forward(HEADWISE_SELF_PARAMETERS) { return run(HEADWISE_SELF_INPUTS, x, false); }
Tensor self(HEADWISE_SELF_PARAMETERS) { return std::get<0>(run(HEADWISE_SELF_INPUTS, x, true)); }

SelfBackward self_backward(const Tensor& grad_output, HEADWISE_SELF_PARAMETERS, const Tensor& q,
                           const Tensor& k, const Tensor& v, const Tensor& context,
                           const Tensor& lse, std::array<bool, 7> needs) {
  const auto in = HEADWISE_SELF_INPUTS;
  const LayerSaved saved{q, k, v, context, lse};
  check_backward(grad_output, in, saved);
  return with_backward_call(in, x, saved, [&]<typename T, typename Acc>(LayerCall<T, Acc>& call) {
    const Gradients<Acc> make{x.options(), !runs_packed(call.layer)};
    kernels::LayerGradients<T, Acc> g;
    Tensor gx, gw, gb, gow, gob, gh;
    g.query = g.key = g.value = make.template large<T>(needs[0], x, gx);
    const int64_t e = out_proj_weight.size(1), width = x.size(2);
    if ((g.q_weight = make.template large<T>(needs[1], in_proj_weight, gw))) {
      g.k_weight = g.q_weight + e * width;
      g.v_weight = g.k_weight + e * width;
    }
    if ((g.q_bias = make.make(needs[2], in_proj_bias, gb))) {
      g.k_bias = g.q_bias + e;
      g.v_bias = g.k_bias + e;
    }
    g.out_weight = make.template large<T>(needs[3], out_proj_weight, gow);
    g.out_bias = make.make(needs[4], out_proj_bias, gob);
    g.head_weight = make.make(needs[5], weight, gh);
    const auto mask = make.mask(needs[6], attn_mask, g.mask);
    run_backward(call, saved, grad_output, g);
    return SelfBackward{make.result(gx, x, needs[0]),
                        make.result(gw, in_proj_weight, needs[1]),
                        make.result(gb, in_proj_bias, needs[2]),
                        make.result(gow, out_proj_weight, needs[3]),
                        make.result(gob, out_proj_bias, needs[4]),
                        make.result(gh, weight, needs[5]),
                        make.mask_result(mask, attn_mask)};
  });
}

LayerForward multihead_forward(HEADWISE_MULTIHEAD_PARAMETERS) {
  return run(HEADWISE_MULTIHEAD_INPUTS, query, false);
}
Tensor multihead(HEADWISE_MULTIHEAD_PARAMETERS) {
  return std::get<0>(run(HEADWISE_MULTIHEAD_INPUTS, query, true));
}

MultiheadBackward multihead_backward(const Tensor& grad_output, HEADWISE_MULTIHEAD_PARAMETERS,
                                     const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& context, const Tensor& lse,
                                     std::array<bool, 15> needs) {
  const auto in = HEADWISE_MULTIHEAD_INPUTS;
  const LayerSaved saved{q, k, v, context, lse};
  check_backward(grad_output, in, saved);
  return with_backward_call(
      in, query, saved, [&]<typename T, typename Acc>(LayerCall<T, Acc>& call) {
        return general_gradients<T, Acc>(
            in, !runs_packed(call.layer), needs,
            [&](const auto& gradients) { run_backward(call, saved, grad_output, gradients); });
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, CPU, m) { HEADWISE_REGISTER_LAYER(m); }

}  // namespace headwise::ops
