// Shared by the CPU kernels of the attention operators: converts selections, masks and gradients
// from tensors to the forms that src/kernels/cpu reads.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/layer.h"
#include "ops/attention_ops.h"

namespace headwise::ops {

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
inline ActiveList list_active(const Tensor& index, const Tensor& count, int64_t num_heads,
                              bool compact) {
  const auto heads = index.to(at::kLong).contiguous(), counts = count.to(at::kLong).contiguous();
  check_selection_values(heads, counts, num_heads);
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

/// float16 and bfloat16 are computed in float32.
template <typename F>
auto dispatch(at::ScalarType type, const F& f) {
  // NOLINTNEXTLINE(bugprone-branch-clone): the types differ.
  return type == at::kDouble ? f(double()) : f(float());
}

constexpr int64_t kMaskCopies = 8;

/// Zeroed gradients in the compute type, and their way back to the type of the input.
template <typename T>
struct Gradients {
  at::TensorOptions options;
  bool zeroed = true;  // whether large() zeroes too: not if the kernel writes all of it
  T* make(bool wanted, const OptionalTensor& input, Tensor& gradient) const {
    gradient = at::zeros(wanted && input ? input->sizes() : at::IntArrayRef({0}),
                         options.dtype(scalar_type_of<T>()));
    return wanted && input ? gradient.template mutable_data_ptr<T>() : nullptr;
  }
  /// The gradient of an input or a weight, in the type that the kernel writes.
  template <typename U>
  U* large(bool wanted, const OptionalTensor& input, Tensor& gradient) const {
    const bool has = wanted && input;
    gradient =
        at::empty(has ? input->sizes() : at::IntArrayRef({0}), options.dtype(scalar_type_of<U>()));
    if (zeroed) gradient.zero_();
    return has ? gradient.template mutable_data_ptr<U>() : nullptr;
  }
  /// Room for the gradient of an additive mask, shaped as the mask, and where it lies: [copies, the
  /// mask's four dimensions]. Never [B, H, L, S] for a mask that is smaller.
  Tensor mask(bool wanted, const OptionalTensor& mask, kernels::MaskGradient<T>& view) const {
    if (!wanted || !mask) return {};
    std::vector<int64_t> sizes(5 - mask->dim(), 1);
    sizes.insert(sizes.end(), mask->sizes().begin(), mask->sizes().end());
    // Heads that share a part of the mask and run at once add to copies of it.
    const bool shared = sizes[1] == 1 && sizes[2] == 1;
    sizes[0] = view.copies = shared ? kMaskCopies : 1;
    auto gradient = at::zeros(sizes, options.dtype(scalar_type_of<T>()));
    auto stride = [&](int dimension) {
      return sizes[dimension] == 1 ? 0 : gradient.stride(dimension);
    };
    view.data = gradient.template mutable_data_ptr<T>();
    view.copy_size = gradient.stride(0);
    view.batch = stride(1), view.head = stride(2), view.row = stride(3), view.column = stride(4);
    return gradient;
  }
  Tensor mask_result(const Tensor& gradient, const OptionalTensor& mask) const {
    return gradient.defined() ? gradient.sum(0).reshape(mask->sizes()).to(mask->scalar_type())
                              : at::empty({0}, options);
  }
  Tensor result(const Tensor& gradient, const OptionalTensor& input, bool wanted) const {
    return wanted && input ? gradient.to(input->scalar_type())
                           : gradient.to(options.dtype().toScalarType());
  }
};

}  // namespace headwise::ops
