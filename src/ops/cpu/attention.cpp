// CPU kernels of the attention operators: tensors in, raw pointers to src/kernels/cpu.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/layer.h"
#include "kernels/cpu/parallel.h"
#include "ops/attention_ops.h"

namespace headwise::ops {
namespace {

using at::Tensor;
using kernels::ActiveHead;

template <typename T>
constexpr at::ScalarType scalar_type_of() {
  return c10::CppTypeToScalarType<T>::value;
}

/// The selection as a list of (sequence, head), and where each sequence begins in it.
struct ActiveList {
  std::vector<ActiveHead> heads;
  std::vector<int64_t> first;
};

/// With `compact`, workspaces hold the chosen heads only, one after the other; otherwise the slot
/// of column n of sequence b is b * K + n.
ActiveList list_active(const Tensor& index, const Tensor& count, int64_t num_heads, bool compact) {
  check_selection_values(index, count, num_heads);
  const auto heads = index.to(at::kLong).contiguous(), counts = count.to(at::kLong).contiguous();
  const int64_t columns = index.size(1);
  ActiveList list;
  for (int64_t b = 0; b < count.size(0); ++b) {
    list.first.push_back(list.heads.size());
    for (int64_t n = 0; n < counts.const_data_ptr<int64_t>()[b]; ++n)
      list.heads.push_back({b, heads.const_data_ptr<int64_t>()[b * columns + n],
                            compact ? int64_t(list.heads.size()) : b * columns + n});
  }
  list.first.push_back(list.heads.size());
  return list;
}

/// Rows of a kv workspace, dtype, and masks in the form that the kernels read. Keeps alive what
/// `shape` points to.
template <typename T>
struct MaskedShape {
  kernels::AttentionShape<T> shape;
  std::vector<int64_t> lengths;
  Tensor key_bias, mask;

  MaskedShape(const AttentionArguments& a, const Tensor& like, int64_t batch, int64_t num_heads,
              int64_t queries, int64_t keys, int64_t added, int64_t width, int64_t value_width) {
    const auto type = scalar_type_of<T>();
    shape.batch = batch;
    shape.num_heads = num_heads;
    shape.queries = queries;
    shape.keys = keys;
    shape.added = added;
    shape.width = width;
    shape.value_width = value_width;
    shape.scale = a.scale ? T(*a.scale) : T(width ? 1 / std::sqrt(double(width)) : 1);
    shape.causal = a.is_causal;
    shape.dropout_p = a.dropout_p;
    if (a.dropout_p > 0) shape.seed = a.dropout_seed->item<int64_t>();
    lengths.assign(batch, keys);
    if (a.key_padding_mask && batch * keys > 0) read_padding(*a.key_padding_mask, type);
    shape.lengths = lengths.data();
    if (a.attn_mask) {
      const bool boolean = a.attn_mask->scalar_type() == at::kBool;
      mask = (boolean ? *a.attn_mask : a.attn_mask->to(type))
                 .expand({batch, num_heads, queries, keys});
      if (boolean)
        shape.mask.forbid = mask.const_data_ptr<bool>();
      else
        shape.mask.add = mask.const_data_ptr<T>();
      shape.mask.batch = mask.stride(0);
      shape.mask.head = mask.stride(1);
      shape.mask.row = mask.stride(2);
      shape.mask.column = mask.stride(3);
    }
  }

 private:
  /// Keys after the last visible one are left out; only a mask that hides or shifts keys before it
  /// needs to be added to scores.
  void read_padding(const Tensor& padding, at::ScalarType type) {
    constexpr T hidden = -std::numeric_limits<T>::infinity();
    key_bias = padding.scalar_type() == at::kBool
                   ? at::zeros(padding.sizes(), padding.options().dtype(type))
                         .masked_fill_(padding, hidden)
                   : padding.to(type).contiguous();
    const T* bias = key_bias.template const_data_ptr<T>();
    bool interior = false;
    for (int64_t b = 0; b < shape.batch; ++b, bias += shape.keys) {
      int64_t length = shape.keys;
      while (length > 0 && bias[length - 1] == hidden) --length;
      lengths[b] = length;
      for (int64_t j = 0; j < length; ++j) interior |= bias[j] != T(0);
    }
    if (interior) shape.key_bias = key_bias.template const_data_ptr<T>();
  }
};

/// Contiguous, in the type that is asked for; kept so that pointers into it stay valid.
struct Operands {
  std::vector<Tensor> kept;
  template <typename T>
  const T* pointer(const OptionalTensor& t) {
    if (!t) return nullptr;
    kept.push_back(t->to(scalar_type_of<T>()).contiguous());
    return kept.back().template const_data_ptr<T>();
  }
  template <typename T>
  kernels::Rows<const T> rows(const Tensor& t) {
    const T* data = pointer<T>(t);
    return {data, t.size(1) * t.size(2), t.size(2), t.size(2)};
  }
};

/// A layer call, ready for the kernels.
template <typename T, typename Acc = T>
struct LayerCall {
  MaskedShape<Acc> masked;
  Operands operands;
  kernels::Layer<T, Acc> layer;
  int64_t columns;

  LayerCall(const SelfInputs& in, bool compact)
      : masked(in.arguments, in.x, in.x.size(0), in.num_heads, in.x.size(1), in.x.size(1), 0,
               head_width(in.out_proj_weight, in.num_heads),
               head_width(in.out_proj_weight, in.num_heads)),
        columns(in.index.size(1)) {
    const int64_t e = in.out_proj_weight.size(1), width = in.x.size(2);
    layer.query = layer.key = layer.value = operands.rows<T>(in.x);
    layer.q_weight = operands.pointer<T>(in.in_proj_weight);
    layer.k_weight = layer.q_weight + e * width;
    layer.v_weight = layer.k_weight + e * width;
    if (in.in_proj_bias) {
      layer.q_bias = operands.pointer<Acc>(in.in_proj_bias);
      layer.k_bias = layer.q_bias + e;
      layer.v_bias = layer.k_bias + e;
    }
    finish(in.out_proj_weight, in.out_proj_bias, in.index, in.count, in.weight, in.num_heads,
           compact);
  }

  LayerCall(const MultiheadInputs& in, bool compact)
      : masked(in.arguments, in.query, in.query.size(0), in.num_heads, in.query.size(1),
               in.key.size(1), in.weights.bias_k.has_value() + in.weights.add_zero_attn,
               head_width(in.weights.out_proj_weight, in.num_heads),
               head_width(in.weights.out_proj_weight, in.num_heads)),
        columns(in.index.size(1)) {
    const auto& w = in.weights;
    layer.query = operands.rows<T>(in.query);
    layer.key = operands.rows<T>(in.key);
    layer.value = operands.rows<T>(in.value);
    layer.q_weight = operands.pointer<T>(w.q_weight);
    layer.k_weight = operands.pointer<T>(w.k_weight);
    layer.v_weight = operands.pointer<T>(w.v_weight);
    layer.q_bias = operands.pointer<Acc>(w.q_bias);
    layer.k_bias = operands.pointer<Acc>(w.k_bias);
    layer.v_bias = operands.pointer<Acc>(w.v_bias);
    layer.bias_k = operands.pointer<Acc>(w.bias_k);
    layer.bias_v = operands.pointer<Acc>(w.bias_v);
    layer.zero_row = w.add_zero_attn;
    finish(w.out_proj_weight, w.out_proj_bias, in.index, in.count, in.weight, in.num_heads,
           compact);
  }
  LayerCall(const LayerCall&) = delete;

  kernels::LayerWorkspace<const T, const Acc> workspace(const LayerSaved& saved) {
    return {operands.pointer<T>(saved.q), operands.pointer<T>(saved.k),
            operands.pointer<T>(saved.v), operands.pointer<T>(saved.context),
            operands.pointer<Acc>(saved.lse)};
  }

 private:
  static int64_t head_width(const Tensor& out_weight, int64_t num_heads) {
    return num_heads ? out_weight.size(1) / num_heads : 0;
  }
  void finish(const Tensor& out_weight, const OptionalTensor& out_bias, const Tensor& index,
              const Tensor& count, const Tensor& weight, int64_t num_heads, bool compact) {
    layer.shape = masked.shape;
    layer.out_weight = operands.pointer<T>(out_weight);
    layer.out_bias = operands.pointer<Acc>(out_bias);
    layer.out_width = out_weight.size(0);
    layer.head_weight = operands.pointer<Acc>(weight);
    auto list = list_active(index, count, num_heads, compact);
    layer.active = std::move(list.heads);
    layer.first = std::move(list.first);
  }
};

/// float16 and bfloat16 are computed in float32.
template <typename F>
auto dispatch(at::ScalarType type, const F& f) {
  return type == at::kDouble ? f(double()) : f(float());
}

template <typename T, typename Acc>
void run_layer(const kernels::Layer<T, Acc>& layer,
               const kernels::LayerWorkspace<T, Acc>& workspace, T* output) {
  if constexpr (!std::is_same_v<T, double>) {
    if (std::is_same_v<T, at::BFloat16> || kernels::packed_layer_supported(layer))
      return kernels::layer_forward_packed(layer, workspace, output);
  }
  if constexpr (std::is_same_v<T, Acc>) kernels::layer_forward(layer, workspace, output);
}

/// Output and workspaces; with `compact` the workspaces are only as large as what was chosen.
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
  auto q = buffer(s.queries, s.width, type), context = buffer(s.queries, s.width, type);
  auto k = buffer(s.keys + s.added, s.width, type), v = buffer(s.keys + s.added, s.width, type);
  auto lse = buffer(s.queries, 1, scalar_type_of<Acc>()).squeeze(-1);
  run_layer<T, Acc>(call.layer,
                    {q.template mutable_data_ptr<T>(), k.template mutable_data_ptr<T>(),
                     v.template mutable_data_ptr<T>(), context.template mutable_data_ptr<T>(),
                     lse.template mutable_data_ptr<Acc>()},
                    output.template mutable_data_ptr<T>());
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

/// Zeroed gradients in the compute type, and their way back to the type of the input.
template <typename T>
struct Gradients {
  at::TensorOptions options;
  T* make(bool wanted, const OptionalTensor& input, Tensor& gradient) const {
    gradient = at::zeros(wanted && input ? input->sizes() : at::IntArrayRef({0}),
                         options.dtype(scalar_type_of<T>()));
    return wanted && input ? gradient.template mutable_data_ptr<T>() : nullptr;
  }
  Tensor scores(bool wanted, int64_t batch, int64_t num_heads, int64_t queries,
                int64_t keys) const {
    return wanted ? at::zeros({batch, num_heads, queries, keys}, options.dtype(scalar_type_of<T>()))
                  : Tensor();
  }
  Tensor mask(const Tensor& scores, const OptionalTensor& mask) const {
    return scores.defined() ? at::sum_to(scores, mask->sizes()).to(mask->scalar_type()).contiguous()
                            : at::empty({0}, options);
  }
  Tensor result(const Tensor& gradient, const OptionalTensor& input, bool wanted) const {
    return wanted && input ? gradient.to(input->scalar_type())
                           : gradient.to(options.dtype().toScalarType());
  }
};

/// Backward in the type in which forward ran, so that what it saved is read as it is.
template <typename T, typename Acc, typename Inputs>
bool run_packed_backward(const Inputs& in, const LayerSaved& saved, const Tensor& grad_output,
                         const kernels::LayerGradients<Acc>& gradients) {
  LayerCall<T, Acc> call(in, false);
  if (!kernels::packed_layer_supported(call.layer)) return false;
  const auto grad = grad_output.to(scalar_type_of<T>()).contiguous();
  kernels::layer_backward_packed<T>(call.layer, call.workspace(saved),
                                    grad.template const_data_ptr<T>(), gradients);
  return true;
}

template <typename Acc, typename Inputs>
void run_backward(const Inputs& in, const LayerSaved& saved, const Tensor& grad_output,
                  const kernels::LayerGradients<Acc>& gradients) {
  if constexpr (std::is_same_v<Acc, float>) {
    const bool half = grad_output.scalar_type() == at::kBFloat16;
    if (half && run_packed_backward<at::BFloat16>(in, saved, grad_output, gradients)) return;
    if (!half && run_packed_backward<float>(in, saved, grad_output, gradients)) return;
  }
  LayerCall<Acc> call(in, false);
  const auto grad = grad_output.to(scalar_type_of<Acc>()).contiguous();
  kernels::layer_backward<Acc>(call.layer, call.workspace(saved),
                               grad.template const_data_ptr<Acc>(), gradients);
}

LayerForward self_forward(HEADWISE_SELF_PARAMETERS) { return run(HEADWISE_SELF_INPUTS, x, false); }
Tensor self(HEADWISE_SELF_PARAMETERS) { return std::get<0>(run(HEADWISE_SELF_INPUTS, x, true)); }

SelfBackward self_backward(const Tensor& grad_output, HEADWISE_SELF_PARAMETERS, const Tensor& q,
                           const Tensor& k, const Tensor& v, const Tensor& context,
                           const Tensor& lse, std::array<bool, 7> needs) {
  const auto in = HEADWISE_SELF_INPUTS;
  check_inputs(in);
  return dispatch(x.scalar_type(), [&]<typename T>(T) -> SelfBackward {
    const Gradients<T> make{x.options()};
    kernels::LayerGradients<T> g;
    Tensor gx, gw, gb, gow, gob, gh;
    g.query = g.key = g.value = make.make(needs[0], x, gx);
    const int64_t e = out_proj_weight.size(1), width = x.size(2);
    if ((g.q_weight = make.make(needs[1], in_proj_weight, gw))) {
      g.k_weight = g.q_weight + e * width;
      g.v_weight = g.k_weight + e * width;
    }
    if ((g.q_bias = make.make(needs[2], in_proj_bias, gb))) {
      g.k_bias = g.q_bias + e;
      g.v_bias = g.k_bias + e;
    }
    g.out_weight = make.make(needs[3], out_proj_weight, gow);
    g.out_bias = make.make(needs[4], out_proj_bias, gob);
    g.head_weight = make.make(needs[5], weight, gh);
    auto scores = make.scores(needs[6] && attn_mask, x.size(0), num_heads, x.size(1), x.size(1));
    if (scores.defined()) g.scores = scores.template mutable_data_ptr<T>();
    run_backward(in, {q, k, v, context, lse}, grad_output, g);
    return {make.result(gx, x, needs[0]),
            make.result(gw, in_proj_weight, needs[1]),
            make.result(gb, in_proj_bias, needs[2]),
            make.result(gow, out_proj_weight, needs[3]),
            make.result(gob, out_proj_bias, needs[4]),
            make.result(gh, weight, needs[5]),
            make.mask(scores, attn_mask)};
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
  check_inputs(in);
  return dispatch(query.scalar_type(), [&]<typename T>(T) -> MultiheadBackward {
    const Gradients<T> make{query.options()};
    kernels::LayerGradients<T> g;
    const OptionalTensor inputs[] = {query,         key,    value,  q_weight, k_weight,
                                     v_weight,      q_bias, k_bias, v_bias,   out_proj_weight,
                                     out_proj_bias, weight, bias_k, bias_v};
    T** pointers[] = {&g.query,    &g.key,         &g.value,  &g.q_weight, &g.k_weight,
                      &g.v_weight, &g.q_bias,      &g.k_bias, &g.v_bias,   &g.out_weight,
                      &g.out_bias, &g.head_weight, &g.bias_k, &g.bias_v};
    std::array<Tensor, 14> results;
    for (int i = 0; i < 14; ++i) *pointers[i] = make.make(needs[i], inputs[i], results[i]);
    auto scores =
        make.scores(needs[14] && attn_mask, query.size(0), num_heads, query.size(1), key.size(1));
    if (scores.defined()) g.scores = scores.template mutable_data_ptr<T>();
    run_backward(in, {q, k, v, context, lse}, grad_output, g);
    for (int i = 0; i < 14; ++i) results[i] = make.result(results[i], inputs[i], needs[i]);
    return std::tuple_cat(results, std::make_tuple(make.mask(scores, attn_mask)));
  });
}

/// Pointers of one head of q, k, v as they lie in memory (the last dimension contiguous).
template <typename T>
struct CoreCall {
  MaskedShape<T> masked;
  Tensor q, k, v, head_weight;
  ActiveList list;
  int64_t group;  ///< query heads that share a key/value head

  explicit CoreCall(const CoreInputs& in)
      : masked(in.arguments, in.q, in.q.size(0), in.q.size(1), in.q.size(2), in.k.size(2), 0,
               in.q.size(3), in.v.size(3)),
        list(list_active(in.index, in.count, in.q.size(1), true)),
        group(in.k.size(1) ? in.q.size(1) / in.k.size(1) : 1) {
    q = rows(in.q);
    k = rows(in.k);
    v = rows(in.v);
    if (in.weight) head_weight = in.weight->to(scalar_type_of<T>()).contiguous();
  }
  CoreCall(const CoreCall&) = delete;

  T weight(const ActiveHead& a) const {
    return head_weight.defined()
               ? head_weight.template const_data_ptr<T>()[a.b * masked.shape.num_heads + a.h]
               : T(1);
  }
  kernels::HeadTensors<T> tensors(const ActiveHead& a) const {
    auto at = [&](const Tensor& t, int64_t h) {
      return t.template const_data_ptr<T>() + a.b * t.stride(0) + h * t.stride(1);
    };
    return {a.b,         a.h,         at(q, a.h), at(k, a.h / group), at(v, a.h / group),
            q.stride(2), k.stride(2), v.stride(2)};
  }

 private:
  static Tensor rows(const Tensor& t) {
    auto y = t.to(scalar_type_of<T>());
    const bool usable = (y.stride(3) == 1 || y.size(3) <= 1) && y.stride(2) >= y.size(3);
    return usable ? y : y.contiguous();
  }
};

CoreForward core_forward(HEADWISE_CORE_PARAMETERS) {
  const auto in = HEADWISE_CORE_INPUTS;
  check_inputs(in);
  return dispatch(q.scalar_type(), [&]<typename T>(T) -> CoreForward {
    CoreCall<T> call(in);
    const auto& s = call.masked.shape;
    const auto options = q.options().dtype(scalar_type_of<T>());
    const int64_t L = s.queries, dv = s.value_width;
    auto output = at::zeros({s.batch, s.num_heads, L, dv}, options);
    auto lse = at::zeros({s.batch, s.num_heads, L}, options);
    auto context = weight ? at::zeros_like(output) : output;
    T* y = output.template mutable_data_ptr<T>();
    T* c = context.template mutable_data_ptr<T>();
    T* log = lse.template mutable_data_ptr<T>();
    const int64_t blocks = (L + kernels::kQueryBlock - 1) / kernels::kQueryBlock;
    const int64_t scratch_size = kernels::attention_scratch(s);
    std::vector<T> scratch(scratch_size * at::get_num_threads());
    kernels::parallel_tasks(call.list.heads.size() * blocks, [&](int64_t task, int64_t worker) {
      const auto& a = call.list.heads[task / blocks];
      const int64_t row = task % blocks * kernels::kQueryBlock;
      const int64_t rows = std::min(kernels::kQueryBlock, L - row);
      const int64_t at = (a.b * s.num_heads + a.h) * L + row;
      kernels::attention_forward(s, call.tensors(a), row, rows, c + at * dv, dv, log + at,
                                 scratch.data() + worker * scratch_size);
      if (weight)
        for (int64_t i = 0; i < rows * dv; ++i) y[at * dv + i] = call.weight(a) * c[at * dv + i];
    });
    const auto type = q.scalar_type();
    return {output.to(type), weight ? context.to(type) : at::empty({0}, q.options()), lse};
  });
}

Tensor core(HEADWISE_CORE_PARAMETERS) {
  return std::get<0>(core_forward(q, k, v, index, count, weight, HEADWISE_MASK_ARGUMENTS));
}

CoreBackward core_backward(const Tensor& grad_output, HEADWISE_CORE_PARAMETERS,
                           const Tensor& output, const Tensor& context, const Tensor& lse,
                           std::array<bool, 5> needs) {
  const auto in = HEADWISE_CORE_INPUTS;
  check_inputs(in);
  return dispatch(q.scalar_type(), [&]<typename T>(T) -> CoreBackward {
    CoreCall<T> call(in);
    const auto& s = call.masked.shape;
    const Gradients<T> make{q.options()};
    const int64_t L = s.queries, S = s.keys, d = s.width, dv = s.value_width;
    const int64_t kv_heads = k.size(1);
    Tensor gq, gk, gv, gw;
    T* dq = make.make(true, q, gq);
    T* dk = make.make(true, k, gk);
    T* dvalue = make.make(true, v, gv);
    T* dw = make.make(needs[3], weight, gw);
    auto scores = make.scores(needs[4] && attn_mask, s.batch, s.num_heads, L, S);
    const auto grad = grad_output.to(scalar_type_of<T>()).contiguous();
    const auto ctx = (weight ? context : output).to(scalar_type_of<T>()).contiguous();
    const auto log = lse.contiguous();
    // Heads that share keys and values add to the same gradient: one worker, one order.
    std::vector<std::vector<ActiveHead>> groups(s.batch * kv_heads);
    for (const auto& a : call.list.heads) groups[a.b * kv_heads + a.h / call.group].push_back(a);
    const int64_t scratch_size = kernels::attention_scratch(s);
    const int64_t head_size = L * (dv + 1) + S * (d + dv);
    std::vector<T> scratch((scratch_size + head_size) * at::get_num_threads());
    kernels::parallel_tasks(groups.size(), [&](int64_t task, int64_t worker) {
      T* gc = scratch.data() + worker * (scratch_size + head_size) + scratch_size;
      T* delta = gc + L * dv;
      T* dkh = delta + L;
      T* dvh = dkh + S * d;
      for (const auto& a : groups[task]) {
        const int64_t at = (a.b * s.num_heads + a.h) * L;
        const T* g = grad.template const_data_ptr<T>() + at * dv;
        const T* c = ctx.template const_data_ptr<T>() + at * dv;
        const T w = call.weight(a);
        T total = 0;
        for (int64_t i = 0; i < L; ++i) {
          T sum = 0;
          for (int64_t j = 0; j < dv; ++j) {
            sum += g[i * dv + j] * c[i * dv + j];
            gc[i * dv + j] = w * g[i * dv + j];
          }
          delta[i] = w * sum;
          total += sum;
        }
        if (dw) dw[a.b * s.num_heads + a.h] = total;
        T* grad_scores =
            scores.defined() ? scores.template mutable_data_ptr<T>() + at * S : nullptr;
        kernels::attention_backward(
            s, call.tensors(a), gc, dv, delta, log.template const_data_ptr<T>() + at, dq + at * d,
            d, dkh, d, dvh, dv, grad_scores, scratch.data() + worker * (scratch_size + head_size));
        const int64_t rows = s.lengths[a.b], kv = task * S;
        for (int64_t i = 0; i < rows * d; ++i) dk[kv * d + i] += dkh[i];
        for (int64_t i = 0; i < rows * dv; ++i) dvalue[kv * dv + i] += dvh[i];
      }
    });
    auto result = [&](const Tensor& gradient, const Tensor& input, bool wanted) {
      return wanted ? gradient.to(input.scalar_type()) : at::empty({0}, q.options());
    };
    return {result(gq, q, needs[0]), result(gk, k, needs[1]), result(gv, v, needs[2]),
            make.result(gw, weight, needs[3]), make.mask(scores, attn_mask)};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("selected_self_attention", self);
  m.impl("_selected_self_attention_forward", self_forward);
  m.impl("_selected_self_attention_backward", self_backward);
  m.impl("selected_multihead_attention", multihead);
  m.impl("_selected_multihead_attention_forward", multihead_forward);
  m.impl("_selected_multihead_attention_backward", multihead_backward);
  m.impl("selected_attention", core);
  m.impl("_selected_attention_forward", core_forward);
  m.impl("_selected_attention_backward", core_backward);
}

}  // namespace headwise::ops
