#include <ATen/ATen.h>

#include <sstream>

#include "ops/attention_ops.h"
#include "ops/backward_checks.h"
#include "ops/projection.h"
#include "ops/routed.h"
#include "ops/select_heads.h"

namespace headwise::ops {
namespace {

using at::Tensor;

std::string shape_text(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.sym_size(i);
  out << ']';
  return out.str();
}

void check_dim(const Tensor& t, const char* name, int64_t dim, const char* rule) {
  TORCH_CHECK_VALUE(t.dim() == dim, name, " must be ", rule, ", got shape ", shape_text(t));
}

/// `size` of `t` must equal the value that `rule` describes.
void check_size(const Tensor& t, const char* name, int64_t axis, const c10::SymInt& size,
                const char* rule) {
  TORCH_CHECK_VALUE(t.sym_size(axis) == size, name, " must be ", rule, " with size ", size,
                    " in dimension ", axis, ", got shape ", shape_text(t));
}

void check_like(const Tensor& t, const char* name, const Tensor& reference,
                const char* reference_name) {
  TORCH_CHECK_TYPE(t.scalar_type() == reference.scalar_type(), name, " must have the dtype of ",
                   reference_name, " (", reference.scalar_type(), "), got ", t.scalar_type());
  TORCH_CHECK(t.device() == reference.device(), name, " must be on the device of ", reference_name,
              " (", reference.device(), "), got ", t.device());
}

void check_bias(const OptionalTensor& t, const char* name, const c10::SymInt& size,
                const Tensor& reference, const char* reference_name) {
  if (!t) return;
  check_dim(*t, name, 1, "a vector");
  check_size(*t, name, 0, size, "a vector");
  check_like(*t, name, reference, reference_name);
}

void check_floating(const Tensor& t, const char* name) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
      " must be float64, float32, bfloat16 or float16, got ", type);
}

void check_selection(const Tensor& index, const Tensor& count, const OptionalTensor& weight,
                     const c10::SymInt& batch, int64_t num_heads, const Tensor& reference,
                     const char* reference_name, const char* weight_name = "weight") {
  auto check_device = [&](const Tensor& t, const char* name) {
    TORCH_CHECK(t.device() == reference.device(), name, " must be on the device of ",
                reference_name, " (", reference.device(), "), got ", t.device());
  };
  check_dim(index, "index", 2, "[B, K]");
  TORCH_CHECK_TYPE(index.scalar_type() == at::kInt || index.scalar_type() == at::kLong,
                   "index must be int32 or int64, got ", index.scalar_type());
  check_size(index, "index", 0, batch, "[B, K]");
  TORCH_CHECK_VALUE(index.sym_size(1) <= num_heads,
                    "index must have at most num_heads = ", num_heads, " columns, got shape ",
                    shape_text(index));
  check_device(index, "index");
  check_dim(count, "count", 1, "[B]");
  TORCH_CHECK_TYPE(count.scalar_type() == at::kInt || count.scalar_type() == at::kLong,
                   "count must be int32 or int64, got ", count.scalar_type());
  check_size(count, "count", 0, batch, "[B]");
  check_device(count, "count");
  if (!weight) return;
  check_dim(*weight, weight_name, 2, "[B, H]");
  check_floating(*weight, weight_name);
  check_size(*weight, weight_name, 0, batch, "[B, H]");
  check_size(*weight, weight_name, 1, num_heads, "[B, H]");
  check_device(*weight, weight_name);
}

void check_masks(const AttentionArguments& arguments, const c10::SymInt& batch, int64_t num_heads,
                 const c10::SymInt& queries, const c10::SymInt& keys, const Tensor& reference,
                 const char* reference_name) {
  if (const auto& mask = arguments.key_padding_mask) {
    check_dim(*mask, "key_padding_mask", 2, "[B, S]");
    TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool || at::isFloatingType(mask->scalar_type()),
                     "key_padding_mask must be bool or floating, got ", mask->scalar_type());
    check_size(*mask, "key_padding_mask", 0, batch, "[B, S]");
    check_size(*mask, "key_padding_mask", 1, keys, "[B, S]");
    TORCH_CHECK(mask->device() == reference.device(), "key_padding_mask must be on the device of ",
                reference_name, " (", reference.device(), "), got ", mask->device());
  }
  if (const auto& mask = arguments.attn_mask) {
    TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool || at::isFloatingType(mask->scalar_type()),
                     "attn_mask must be bool or floating, got ", mask->scalar_type());
    TORCH_CHECK(mask->device() == reference.device(), "attn_mask must be on the device of ",
                reference_name, " (", reference.device(), "), got ", mask->device());
    const c10::SymInt full[] = {batch, num_heads, queries, keys};
    bool fits = mask->dim() <= 4;
    for (int64_t axis = 0; fits && axis < mask->dim(); ++axis) {
      const auto size = mask->sym_size(axis);
      fits = size == full[axis + 4 - mask->dim()] || size == 1;
    }
    TORCH_CHECK_VALUE(fits, "attn_mask must be broadcastable to [B, H, L, S] = [", batch, ", ",
                      num_heads, ", ", queries, ", ", keys, "], got shape ", shape_text(*mask));
  }
  TORCH_CHECK_VALUE(arguments.dropout_p >= 0 && arguments.dropout_p <= 1,
                    "dropout_p must be in [0, 1], got ", arguments.dropout_p);
  if (arguments.dropout_p > 0) {
    TORCH_CHECK_VALUE(arguments.dropout_seed.has_value(),
                      "dropout_seed must be given when dropout_p > 0, got None");
    const auto& seed = *arguments.dropout_seed;
    TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, "dropout_seed must be int64, got ",
                     seed.scalar_type());
    TORCH_CHECK_VALUE(seed.sym_numel() == 1, "dropout_seed must have one element, got shape ",
                      shape_text(seed));
  }
}

void check_num_heads(int64_t num_heads, const c10::SymInt& width, const char* name) {
  check_heads(num_heads, "num_heads");
  TORCH_CHECK_VALUE(num_heads > 0 ? width % num_heads == 0 : width == 0, "num_heads must divide ",
                    name, " (", width, "), got ", num_heads);
}

/// `t` must be a result of forward: of these sizes and dtype, on the device of `reference`.
void check_given(const Tensor& t, const char* name, c10::SymIntArrayRef sizes, at::ScalarType type,
                 const Tensor& reference) {
  TORCH_CHECK_VALUE(t.sym_sizes() == sizes, name, " must have shape ", sizes, ", got shape ",
                    shape_text(t));
  TORCH_CHECK_TYPE(t.scalar_type() == type, name, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK(t.device() == reference.device(), name, " must be on the device of the inputs (",
              reference.device(), "), got ", t.device());
}

void check_layer_backward(const Tensor& grad_output, const Tensor& query, const c10::SymInt& keys,
                          const Tensor& out_weight, int64_t num_heads, const c10::SymInt& slots,
                          const LayerSaved& saved, at::ScalarType type) {
  const auto given = query.scalar_type();
  const auto batch = query.sym_size(0), queries = query.sym_size(1);
  const auto width = num_heads ? out_weight.sym_size(1) / num_heads : c10::SymInt(0);
  check_given(grad_output, "grad_output", {batch, queries, out_weight.sym_size(0)}, given, query);
  check_given(saved.q, "q", {batch, slots, queries, width}, type, query);
  check_given(saved.k, "k", {batch, slots, keys, width}, type, query);
  check_given(saved.v, "v", {batch, slots, keys, width}, type, query);
  check_given(saved.context, "context", {batch, slots, queries, width}, type, query);
  check_given(saved.lse, "lse", {batch, slots, queries}, lse_type(given), query);
}

}  // namespace

void check_inputs(const SelfInputs& in) {
  const auto& x = in.x;
  check_floating(x, "x");
  check_dim(x, "x", 3, "[B, L, D]");
  check_dim(in.in_proj_weight, "in_proj_weight", 2, "[3E, D]");
  const auto rows = in.in_proj_weight.sym_size(0);
  TORCH_CHECK_VALUE(rows % 3 == 0,
                    "in_proj_weight must have 3E rows (query, key, value), got shape ",
                    shape_text(in.in_proj_weight));
  const auto e = rows / 3;
  check_num_heads(in.num_heads, e, "the rows of in_proj_weight / 3");
  check_size(in.in_proj_weight, "in_proj_weight", 1, x.sym_size(2), "[3E, D]");
  check_like(in.in_proj_weight, "in_proj_weight", x, "x");
  check_bias(in.in_proj_bias, "in_proj_bias", rows, x, "x");
  check_dim(in.out_proj_weight, "out_proj_weight", 2, "[D, E]");
  check_size(in.out_proj_weight, "out_proj_weight", 1, e, "[D, E]");
  check_like(in.out_proj_weight, "out_proj_weight", x, "x");
  check_bias(in.out_proj_bias, "out_proj_bias", in.out_proj_weight.sym_size(0), x, "x");
  check_selection(in.index, in.count, in.weight, x.sym_size(0), in.num_heads, x, "x");
  check_masks(in.arguments, x.sym_size(0), in.num_heads, x.sym_size(1), x.sym_size(1), x, "x");
}

namespace {

/// Inputs, weights and masks of the general form; not what was chosen.
template <typename Inputs>
void check_general(const Inputs& in) {
  const auto& query = in.query;
  const auto& w = in.weights;
  check_floating(query, "query");
  check_dim(query, "query", 3, "[B, L, D]");
  check_dim(in.key, "key", 3, "[B, S, Dk]");
  check_dim(in.value, "value", 3, "[B, S, Dv]");
  const auto batch = query.sym_size(0), keys = in.key.sym_size(1);
  check_size(in.key, "key", 0, batch, "[B, S, Dk]");
  check_size(in.value, "value", 0, batch, "[B, S, Dv]");
  check_size(in.value, "value", 1, keys, "[B, S, Dv]");
  check_like(in.key, "key", query, "query");
  check_like(in.value, "value", query, "query");
  check_dim(w.q_weight, "q_weight", 2, "[E, D]");
  const auto e = w.q_weight.sym_size(0);
  check_num_heads(in.num_heads, e, "the rows of q_weight");
  auto check_weight = [&](const Tensor& t, const char* name, const c10::SymInt& width,
                          const char* rule) {
    check_dim(t, name, 2, rule);
    check_size(t, name, 0, e, rule);
    check_size(t, name, 1, width, rule);
    check_like(t, name, query, "query");
  };
  check_weight(w.q_weight, "q_weight", query.sym_size(2), "[E, D]");
  check_weight(w.k_weight, "k_weight", in.key.sym_size(2), "[E, Dk]");
  check_weight(w.v_weight, "v_weight", in.value.sym_size(2), "[E, Dv]");
  check_bias(w.q_bias, "q_bias", e, query, "query");
  check_bias(w.k_bias, "k_bias", e, query, "query");
  check_bias(w.v_bias, "v_bias", e, query, "query");
  check_dim(w.out_proj_weight, "out_proj_weight", 2, "[D, E]");
  check_size(w.out_proj_weight, "out_proj_weight", 1, e, "[D, E]");
  check_like(w.out_proj_weight, "out_proj_weight", query, "query");
  check_bias(w.out_proj_bias, "out_proj_bias", w.out_proj_weight.sym_size(0), query, "query");
  TORCH_CHECK_VALUE(w.bias_k.has_value() == w.bias_v.has_value(),
                    "bias_k and bias_v must be given together, got only ",
                    w.bias_k ? "bias_k" : "bias_v");
  check_bias(w.bias_k, "bias_k", e, query, "query");
  check_bias(w.bias_v, "bias_v", e, query, "query");
  check_masks(in.arguments, batch, in.num_heads, query.sym_size(1), keys, query, "query");
}

}  // namespace

void check_inputs(const MultiheadInputs& in) {
  check_general(in);
  check_selection(in.index, in.count, in.weight, in.query.sym_size(0), in.num_heads, in.query,
                  "query");
}

void check_inputs(const RoutedInputs& in) {
  check_general(in);
  const auto check = [&](const Tensor& t, const char* name) {
    check_dim(t, name, 3, "[B, L, H]");
    check_size(t, name, 0, in.query.sym_size(0), "[B, L, H]");
    check_size(t, name, 1, in.query.sym_size(1), "[B, L, H]");
    check_size(t, name, 2, in.num_heads, "[B, L, H]");
    TORCH_CHECK(t.device() == in.query.device(), name, " must be on the device of query (",
                in.query.device(), "), got ", t.device());
  };
  TORCH_CHECK_TYPE(in.chosen.scalar_type() == at::kBool, "chosen must be bool, got ",
                   in.chosen.scalar_type());
  check(in.chosen, "chosen");
  check_floating(in.weight, "weight");
  check(in.weight, "weight");
}

void check_inputs(const CoreInputs& in) {
  const auto& q = in.q;
  check_floating(q, "q");
  check_dim(q, "q", 4, "[B, H, L, d]");
  check_dim(in.k, "k", 4, "[B, Hkv, S, d]");
  check_dim(in.v, "v", 4, "[B, Hkv, S, dv]");
  check_like(in.k, "k", q, "q");
  check_like(in.v, "v", q, "q");
  const auto batch = q.sym_size(0), keys = in.k.sym_size(2), kv_heads = in.k.sym_size(1);
  check_size(in.k, "k", 0, batch, "[B, Hkv, S, d]");
  check_size(in.k, "k", 3, q.sym_size(3), "[B, Hkv, S, d]");
  check_size(in.v, "v", 0, batch, "[B, Hkv, S, dv]");
  check_size(in.v, "v", 1, kv_heads, "[B, Hkv, S, dv]");
  check_size(in.v, "v", 2, keys, "[B, Hkv, S, dv]");
  const int64_t heads = q.sym_size(1).guard_int(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(kv_heads == 0 ? heads == 0 : heads % kv_heads == 0,
                    "the heads of k and v must divide the heads of q (", heads, "), got ",
                    kv_heads);
  check_selection(in.index, in.count, in.weight, batch, heads, q, "q");
  check_masks(in.arguments, batch, heads, q.sym_size(2), keys, q, "q");
}

void check_inputs(const ProjectionInputs& in) {
  const auto& x = in.x;
  check_floating(x, "x");
  check_dim(x, "x", 3, "[B, L, D]");
  check_dim(in.weight, "weight", 2, "[H * d, D]");
  check_num_heads(in.num_heads, in.weight.sym_size(0), "the rows of weight");
  check_size(in.weight, "weight", 1, x.sym_size(2), "[H * d, D]");
  check_like(in.weight, "weight", x, "x");
  check_bias(in.bias, "bias", in.weight.sym_size(0), x, "x");
  check_selection(in.index, in.count, {}, x.sym_size(0), in.num_heads, x, "x");
}

void check_inputs(const OutputInputs& in) {
  const auto& heads = in.heads;
  check_floating(heads, "heads");
  check_dim(heads, "heads", 4, "[B, H, L, d]");
  check_dim(in.weight, "weight", 2, "[Dout, H * d]");
  check_size(in.weight, "weight", 1, heads.sym_size(1) * heads.sym_size(3), "[Dout, H * d]");
  check_like(in.weight, "weight", heads, "heads");
  check_bias(in.bias, "bias", in.weight.sym_size(0), heads, "heads");
  const int64_t num_heads = heads.sym_size(1).guard_int(__FILE__, __LINE__);
  check_selection(in.index, in.count, in.head_weight, heads.sym_size(0), num_heads, heads, "heads",
                  "head_weight");
}

void check_backward(const Tensor& grad_output, const SelfInputs& in, const LayerSaved& saved) {
  check_inputs(in);
  check_layer_backward(grad_output, in.x, in.x.sym_size(1), in.out_proj_weight, in.num_heads,
                       in.index.sym_size(1), saved, in.x.scalar_type());
}

void check_backward(const Tensor& grad_output, const MultiheadInputs& in, const LayerSaved& saved) {
  check_inputs(in);
  check_layer_backward(grad_output, in.query, in.key.sym_size(1) + added_rows(in.weights),
                       in.weights.out_proj_weight, in.num_heads, in.index.sym_size(1), saved,
                       in.query.scalar_type());
}

void check_backward(const Tensor& grad_output, const RoutedInputs& in, const LayerSaved& saved) {
  check_inputs(in);
  check_layer_backward(grad_output, in.query, in.key.sym_size(1) + added_rows(in.weights),
                       in.weights.out_proj_weight, in.num_heads, in.num_heads, saved,
                       lse_type(in.query.scalar_type()));
}

void check_backward(const Tensor& grad_output, const CoreInputs& in, const Tensor& output,
                    const Tensor& context, const Tensor& lse) {
  check_inputs(in);
  const auto type = in.q.scalar_type();
  const auto batch = in.q.sym_size(0), heads = in.q.sym_size(1), queries = in.q.sym_size(2),
             width = in.v.sym_size(3);
  check_given(grad_output, "grad_output", {batch, heads, queries, width}, type, in.q);
  check_given(output, "output", {batch, heads, queries, width}, type, in.q);
  if (in.weight) check_given(context, "context", {batch, heads, queries, width}, type, in.q);
  check_given(lse, "lse", {batch, heads, queries}, lse_type(type), in.q);
}

void check_backward(const Tensor& grad_output, const ProjectionInputs& in) {
  check_inputs(in);
  const auto width = in.num_heads ? in.weight.sym_size(0) / in.num_heads : c10::SymInt(0);
  check_given(grad_output, "grad_output", {in.x.sym_size(0), in.num_heads, in.x.sym_size(1), width},
              in.x.scalar_type(), in.x);
}

void check_backward(const Tensor& grad_output, const OutputInputs& in) {
  check_inputs(in);
  check_given(grad_output, "grad_output",
              {in.heads.sym_size(0), in.heads.sym_size(2), in.weight.sym_size(0)},
              in.heads.scalar_type(), in.heads);
}

void check_selection_values(const Tensor& index, const Tensor& count, int64_t num_heads) {
  const auto counts = count.to(at::kLong).contiguous();
  const auto heads = index.to(at::kLong).contiguous();
  const int64_t columns = index.size(1);
  for (int64_t b = 0; b < count.size(0); ++b) {
    const int64_t chosen = counts.const_data_ptr<int64_t>()[b];
    TORCH_CHECK_VALUE(chosen >= 0 && chosen <= columns, "count must be between 0 and ", columns,
                      ", got ", chosen, " for sequence ", b);
    const int64_t* row = heads.const_data_ptr<int64_t>() + b * columns;
    for (int64_t n = 0; n < chosen; ++n) {
      TORCH_CHECK_INDEX(row[n] >= 0 && row[n] < num_heads, "index must name heads between 0 and ",
                        num_heads - 1, ", got ", row[n], " for sequence ", b);
      TORCH_CHECK_VALUE(n == 0 || row[n] > row[n - 1],
                        "index must be ascending without repeats, got ", row[n - 1], " before ",
                        row[n], " for sequence ", b);
    }
  }
}

at::ScalarType lse_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace headwise::ops
