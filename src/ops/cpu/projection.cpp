// CPU kernels of the projections: tensors in, raw pointers to src/kernels/cpu.
#include "ops/projection.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <type_traits>

#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/projection.h"
#include "ops/backward_checks.h"
#include "ops/cpu/attention_call.h"

namespace headwise::ops {
namespace {

using kernels::ChosenHeads;
using kernels::HeadRows;
using kernels::HeadWeight;
using kernels::Rows;

/// A selection over heads [B, H, L, d], and the heads that some sequence chose.
struct Choice {
  ActiveList list;
  std::vector<std::pair<int64_t, int64_t>> used;  ///< runs of heads: first, number
  ChosenHeads chosen;

  Choice(const Tensor& index, const Tensor& count, int64_t num_heads, int64_t rows, int64_t width)
      : list(list_active(index, count, num_heads, true)),
        chosen{index.size(0), num_heads, rows, width, list.heads, list.first} {
    std::vector<char> marks(num_heads);
    for (const auto& a : list.heads) marks[a.h] = 1;
    for (int64_t h = 0; h < num_heads; ++h) {
      if (!marks[h]) continue;
      if (used.empty() || used.back().first + used.back().second != h) used.emplace_back(h, 0);
      ++used.back().second;
    }
  }
  Choice(const Choice&) = delete;

  /// Copies the used heads' part of [H d, C] or, transposed, [C, H d].
  void copy(const Tensor& from, Tensor& to, bool turned) const {
    const int64_t axis = turned ? 1 : 0, d = chosen.width;
    for (const auto& [h, n] : used)
      to.narrow(axis, h * d, n * d).copy_(from.narrow(axis, h * d, n * d));
  }
  /// Whether so few rows are multiplied that weights are read unpacked.
  bool thin() const { return chosen.batch * chosen.rows <= kernels::kThinRows; }
};

/// f(T(), Acc()) with the types that a call is stored and summed in.
template <typename F>
auto dispatch_projection(at::ScalarType type, int64_t width, int64_t columns, const F& f) {
  if (type == at::kDouble) return f(double(), double());
  if (type == at::kBFloat16 && kernels::packed_projection_supported<at::BFloat16>(width, columns))
    return f(at::BFloat16(), float());
  return f(float(), float());
}

// The packed kernels if they serve these sizes, else the general ones.
template <typename T>
bool packed(const ChosenHeads& chosen, int64_t columns) {
  if constexpr (std::is_same_v<T, double>)
    return false;
  else
    return kernels::packed_projection_supported<T>(chosen.width, columns);
}
template <typename T, typename Acc>
void project(const ChosenHeads& chosen, const Rows<const T>& x, const HeadWeight<const T>& weight,
             const Acc* bias, const HeadRows<T>& y) {
  if constexpr (!std::is_same_v<T, double>)
    if (packed<T>(chosen, weight.columns))
      return kernels::project_heads_packed<T>(chosen, x, weight, bias, y);
  if constexpr (std::is_same_v<T, Acc>) kernels::project_heads<T>(chosen, x, weight, bias, y);
}
template <typename T, typename Acc>
void combine(const ChosenHeads& chosen, const HeadRows<const T>& x,
             const HeadWeight<const T>& weight, const Acc* bias, const Acc* factor, T* y) {
  if constexpr (!std::is_same_v<T, double>)
    if (packed<T>(chosen, weight.columns))
      return kernels::combine_heads_packed<T>(chosen, x, weight, bias, factor, y);
  if constexpr (std::is_same_v<T, Acc>)
    kernels::combine_heads<T>(chosen, x, weight, bias, factor, y);
}
template <typename T, typename Acc>
void outer(const ChosenHeads& chosen, const HeadRows<const T>& y, const Rows<const T>& x,
           const Acc* factor, const HeadWeight<Acc>& weight, Acc* sums) {
  if constexpr (!std::is_same_v<T, double>)
    if (packed<T>(chosen, weight.columns))
      return kernels::outer_heads_packed<T, Acc>(chosen, y, x, factor, weight, sums);
  if constexpr (std::is_same_v<T, Acc>) kernels::outer_heads<T>(chosen, y, x, factor, weight, sums);
}

/// In the layout that the kernels need: columns next to each other, rows that do not overlap.
Tensor stepped(const Tensor& t) {
  const bool usable = (t.stride(-1) == 1 || t.size(-1) <= 1) && t.stride(-2) >= t.size(-1);
  return usable ? t : t.contiguous();
}
template <typename T>
Tensor readable(const Tensor& t) {
  return stepped(t.to(scalar_type_of<T>()));
}
/// A weight; converted, if needed, for the used heads only.
template <typename T>
Tensor readable_weight(const Tensor& t, bool turned, const Choice& choice) {
  if (t.scalar_type() == scalar_type_of<T>()) return stepped(t);
  auto y = at::empty(t.sizes(), t.options().dtype(scalar_type_of<T>()));
  choice.copy(t, y, turned);
  return y;
}
template <typename T>
Tensor contiguous(const OptionalTensor& t) {
  return t ? t->to(scalar_type_of<T>()).contiguous() : Tensor();
}
template <typename T>
const T* pointer(const Tensor& t) {
  return t.defined() ? t.template const_data_ptr<T>() : nullptr;
}

template <typename T>
Rows<const T> rows_of(const Tensor& t) {  // [B, L, C]
  return {t.template const_data_ptr<T>(), t.stride(0), t.stride(1), t.size(2)};
}
template <typename T>
HeadRows<const T> heads_of(const Tensor& t) {  // [B, H, L, d]
  return {t.template const_data_ptr<T>(), t.stride(0), t.stride(1), 0, t.stride(2)};
}
template <typename T>
HeadRows<T> new_heads(Tensor& t) {
  return {t.template mutable_data_ptr<T>(), t.stride(0), t.stride(1), 0, t.stride(2)};
}
/// A weight [H d, C], or [C, H d] (`turned`).
template <typename T>
HeadWeight<const T> weight_of(const Tensor& t, bool turned) {
  return {t.template const_data_ptr<T>(), t.size(turned ? 0 : 1), t.stride(0), turned};
}

/// [B, H, L, d] of which the heads that were not chosen are zeros, and the others not yet written.
template <typename T>
Tensor empty_heads(const ChosenHeads& chosen, const at::TensorOptions& options) {
  auto y = at::empty({chosen.batch, chosen.num_heads, chosen.rows, chosen.width},
                     options.dtype(scalar_type_of<T>()));
  std::vector<char> used(chosen.batch * chosen.num_heads);
  for (const auto& a : chosen.active) used[a.b * chosen.num_heads + a.h] = 1;
  T* const data = y.template mutable_data_ptr<T>();
  const int64_t size = chosen.rows * chosen.width;
  for (size_t n = 0; n < used.size(); ++n)
    if (!used[n]) std::fill_n(data + n * size, size, T(0));
  return y;
}

/// The gradient of a weight, summed in Acc for the used heads; zeros elsewhere.
template <typename Acc>
class WeightGradient {
 public:
  WeightGradient(bool wanted, const Tensor& weight, bool turned, const Choice& choice)
      : turned_(turned),
        choice_(choice),
        result_(at::zeros(wanted ? weight.sizes() : at::IntArrayRef({0}), weight.options())) {
    if (!wanted) return;
    columns_ = weight.size(turned ? 0 : 1);
    ld_ = weight.size(1);
    sums_ = result_;
    if (result_.scalar_type() == scalar_type_of<Acc>()) return;
    sums_ = at::empty(weight.sizes(), weight.options().dtype(scalar_type_of<Acc>()));
    choice.copy(result_, sums_, turned);
  }
  HeadWeight<Acc> sums() {
    return {sums_.defined() ? sums_.template mutable_data_ptr<Acc>() : nullptr, columns_, ld_,
            turned_};
  }
  Tensor result() {
    if (sums_.defined() && !sums_.is_same(result_)) choice_.copy(sums_, result_, turned_);
    return result_;
  }

 private:
  bool turned_;
  const Choice& choice_;
  Tensor result_, sums_;
  int64_t columns_ = 0, ld_ = 0;
};

Tensor none(const Tensor& like) { return at::empty({0}, like.options()); }

Tensor projection(HEADWISE_PROJECTION_PARAMETERS) {
  const auto in = HEADWISE_PROJECTION_INPUTS;
  check_inputs(in);
  const Choice choice(index, count, num_heads, x.size(1), head_width(in));
  const auto& chosen = choice.chosen;
  return dispatch_projection(
      x.scalar_type(), chosen.width, x.size(2), [&]<typename T, typename Acc>(T, Acc) {
        const auto rows = readable<T>(x), b = contiguous<Acc>(bias);
        auto y = empty_heads<T>(chosen, x.options());
        if constexpr (std::is_same_v<T, float>)
          if (x.scalar_type() == at::kHalf && choice.thin()) {
            const auto w = stepped(weight);
            kernels::project_heads_thin<float, at::Half>(chosen, rows_of<T>(rows),
                                                         weight_of<at::Half>(w, false),
                                                         pointer<Acc>(b), new_heads<T>(y));
            return y.to(x.scalar_type());
          }
        const auto w = readable_weight<T>(weight, false, choice);
        project<T, Acc>(chosen, rows_of<T>(rows), weight_of<T>(w, false), pointer<Acc>(b),
                        new_heads<T>(y));
        return y.to(x.scalar_type());
      });
}

ProjectionBackward projection_backward(HEADWISE_PROJECTION_BACKWARD_PARAMETERS) {
  const ProjectionInputs in{x, weight, {}, num_heads, index, count};
  check_backward(grad_output, in);
  const Choice choice(index, count, num_heads, x.size(1), head_width(in));
  const auto& chosen = choice.chosen;
  return dispatch_projection(
      x.scalar_type(), chosen.width, x.size(2),
      [&]<typename T, typename Acc>(T, Acc) -> ProjectionBackward {
        const auto grad = readable<T>(grad_output);  // [B, H, L, d]
        Tensor gx = none(x), gb = none(x);
        if (needs[0]) {
          const auto w = readable_weight<T>(weight, false, choice);
          gx = at::empty(x.sizes(), x.options().dtype(scalar_type_of<T>()));
          combine<T, Acc>(chosen, heads_of<T>(grad), weight_of<T>(w, false), nullptr, nullptr,
                          gx.template mutable_data_ptr<T>());
        }
        WeightGradient<Acc> gw(needs[1], weight, false, choice);
        if (needs[2]) gb = at::zeros({weight.size(0)}, x.options().dtype(scalar_type_of<Acc>()));
        if (needs[1] || needs[2]) {
          const auto rows = readable<T>(x);
          auto sums = gw.sums();
          sums.columns = x.size(2);
          outer<T, Acc>(chosen, heads_of<T>(grad), rows_of<T>(rows), nullptr, sums,
                        needs[2] ? gb.template mutable_data_ptr<Acc>() : nullptr);
        }
        const auto type = x.scalar_type();
        return {gx.to(type), gw.result(), gb.to(type)};
      });
}

Tensor output_projection(HEADWISE_OUTPUT_PARAMETERS) {
  check_inputs(HEADWISE_OUTPUT_INPUTS);
  const Choice choice(index, count, heads.size(1), heads.size(2), heads.size(3));
  const auto& chosen = choice.chosen;
  return dispatch_projection(
      heads.scalar_type(), chosen.width, weight.size(0), [&]<typename T, typename Acc>(T, Acc) {
        const auto rows = readable<T>(heads), b = contiguous<Acc>(bias),
                   factor = contiguous<Acc>(head_weight);
        auto y = at::empty({chosen.batch, chosen.rows, weight.size(0)}, rows.options());
        T* const data = y.template mutable_data_ptr<T>();
        if constexpr (std::is_same_v<T, float>)
          if (heads.scalar_type() == at::kHalf && choice.thin()) {
            const auto w = stepped(weight);
            kernels::combine_heads_thin<float, at::Half>(
                chosen, heads_of<T>(rows), weight_of<at::Half>(w, true), pointer<Acc>(b),
                pointer<Acc>(factor), data);
            return y.to(heads.scalar_type());
          }
        const auto w = readable_weight<T>(weight, true, choice);
        combine<T, Acc>(chosen, heads_of<T>(rows), weight_of<T>(w, true), pointer<Acc>(b),
                        pointer<Acc>(factor), data);
        return y.to(heads.scalar_type());
      });
}

OutputBackward output_projection_backward(HEADWISE_OUTPUT_BACKWARD_PARAMETERS) {
  check_backward(grad_output, OutputInputs{heads, weight, {}, index, count, head_weight});
  const Choice choice(index, count, heads.size(1), heads.size(2), heads.size(3));
  const auto& chosen = choice.chosen;
  return dispatch_projection(
      heads.scalar_type(), chosen.width, weight.size(0),
      [&]<typename T, typename Acc>(T, Acc) -> OutputBackward {
        const auto grad = readable<T>(grad_output);  // [B, L, Dout]
        const auto rows = readable<T>(heads), factor = contiguous<Acc>(head_weight);
        Tensor gh = none(heads), gb = none(heads), gf = none(heads);
        if (needs[3] && head_weight) gf = at::zeros(head_weight->sizes(), factor.options());
        if (needs[0] || gf.numel()) {
          const auto w = readable_weight<T>(weight, true, choice);
          gh = empty_heads<T>(chosen, heads.options());
          project<T, Acc>(chosen, rows_of<T>(grad), weight_of<T>(w, true), nullptr,
                          new_heads<T>(gh));
          if (factor.defined())
            kernels::weigh_gradient<T, Acc>(
                chosen, heads_of<T>(rows), pointer<Acc>(factor), new_heads<T>(gh),
                gf.numel() ? gf.template mutable_data_ptr<Acc>() : nullptr);
        }
        WeightGradient<Acc> gw(needs[1], weight, true, choice);
        if (needs[1])
          outer<T, Acc>(chosen, heads_of<T>(rows), rows_of<T>(grad), pointer<Acc>(factor),
                        gw.sums(), nullptr);
        if (needs[2]) gb = grad_output.sum(at::IntArrayRef({0, 1}));
        const auto type = heads.scalar_type();
        return {needs[0] ? gh.to(type) : none(heads), gw.result(), gb,
                head_weight && needs[3] ? gf.to(head_weight->scalar_type()) : none(heads)};
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, CPU, m) { HEADWISE_REGISTER_PROJECTION(m); }

}  // namespace headwise::ops
