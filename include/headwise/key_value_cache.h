// Keys and values of the tokens so far, for decoding step by step.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "headwise/export.h"
#include "headwise/selection.h"

namespace headwise {

/// One layer's keys and values, appended with every call of GroupedQueryAttention. With the option
/// keep_selection it also holds the prompt's choice, and only the key/value heads that it reads.
class HEADWISE_API KeyValueCache {
 public:
  /// Tokens that it holds.
  int64_t size() const { return k.defined() ? k.size(2) : 0; }

  /// Appends keys and values [B, Hkv or K, L, d] and returns all of them, the new ones last.
  std::tuple<at::Tensor, at::Tensor> update(const at::Tensor& new_k, const at::Tensor& new_v);

  /// Selects the sequences `rows`, int64 [B']: some of them, in another order, or repeated. Their
  /// kept selection moves with them.
  void select_rows(const at::Tensor& rows);

  /// Drops all tokens after the first `length`; with 0 the sequences too.
  /// @throws c10::ValueError if it is negative
  void crop(int64_t length);

  at::Tensor k;                        ///< [B, Hkv or K, S, d], rotated; undefined if empty
  at::Tensor v;                        ///< the same shape
  std::optional<Selection> selection;  ///< the prompt's, with keep_selection
  /// int64 [B, K]: the key/value heads stored for each sequence, ascending, then -1; undefined:
  /// all.
  at::Tensor slots;
};

}  // namespace headwise
