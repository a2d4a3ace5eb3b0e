// A layer's input and its padding as the kernels read them.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "kernels/cpu/pooled_input.h"

namespace headwise::ops {

/// Fills `in`; `kept` holds the memory that it points to.
template <typename T>
void read_input(kernels::PooledInput<T>& in, const at::Tensor& x,
                const std::optional<at::Tensor>& key_padding_mask, std::vector<at::Tensor>& kept) {
  using C = typename kernels::PooledInput<T>::C;
  in.batch = x.size(0), in.rows = x.size(1), in.width = x.size(2);
  const at::Tensor& input =
      kept.emplace_back(x.stride(2) == 1 || in.width == 1 ? x : x.contiguous());
  in.x = input.const_data_ptr<T>();
  in.x_batch = input.stride(0), in.x_row = input.stride(1);
  if (!key_padding_mask) return;
  const bool boolean = key_padding_mask->scalar_type() == at::kBool;
  const at::Tensor& mask = kept.emplace_back(
      boolean ? *key_padding_mask : key_padding_mask->to(c10::CppTypeToScalarType<C>::value));
  if (boolean)
    in.padding = mask.const_data_ptr<bool>();
  else
    in.added = mask.const_data_ptr<C>();
  in.mask_batch = mask.stride(0), in.mask_row = mask.stride(1);
}

}  // namespace headwise::ops
