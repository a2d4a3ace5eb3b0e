// What the sizes of every attention layer must fulfil.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

namespace headwise {

/// @throws c10::ValueError naming the size
inline void check_layer_sizes(int64_t embed_dim, int64_t num_heads, std::optional<int64_t> head_dim,
                              double dropout) {
  TORCH_CHECK_VALUE(embed_dim > 0, "embed_dim must be positive, got ", embed_dim);
  TORCH_CHECK_VALUE(num_heads > 0 || (num_heads == 0 && head_dim),
                    "num_heads must be positive (or 0 if head_dim is given), got ", num_heads);
  TORCH_CHECK_VALUE(!head_dim || *head_dim > 0, "head_dim must be positive, got ",
                    head_dim.value_or(0));
  TORCH_CHECK_VALUE(head_dim || embed_dim % num_heads == 0,
                    "num_heads must divide embed_dim=", embed_dim, " (or head_dim be given), got ",
                    num_heads);
  TORCH_CHECK_VALUE(dropout >= 0.0 && dropout <= 1.0, "dropout must be between 0 and 1, got ",
                    dropout);
}

}  // namespace headwise
