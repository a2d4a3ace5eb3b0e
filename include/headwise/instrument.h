// Observing, overriding and probing the attention layers of a model while it runs, as
// headwise.instrument does in Python.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "headwise/export.h"
#include "headwise/layers.h"

namespace headwise {

/// The layer's own selection: by its gate, or all heads if it has none.
using Choose = std::function<Selection()>;
/// Selects the heads of one call of a layer.
/// @param layer its position among the layers
/// @param inputs B: the number of inputs
/// @param like dtype and device of a selection's weights
using Override = std::function<Selection(size_t layer, int64_t inputs,
                                         const at::TensorOptions& like, const Choose& choose)>;
/// Receives what all heads of a layer compute in one call.
using Probe = std::function<void(size_t layer, const AttentionProbe& probe)>;

/// Observes, overrides and probes attention layers during its lifetime; afterwards they are
/// restored. The caller runs the model and sets its mode. Example: Instrumented
/// opened(attention_layers(*model)); opened.override_with(fn);
class HEADWISE_API Instrumented {
 public:
  explicit Instrumented(AttentionLayers layers);
  ~Instrumented();
  Instrumented(const Instrumented&) = delete;
  Instrumented& operator=(const Instrumented&) = delete;

  const AttentionLayers& layers() const { return layers_; }

  /// Lets `fn` select the heads of every call of every layer. If it does not call `choose`, the
  /// gate does not run; heads attend as with the layer's own gate. Of several, the last one is
  /// asked first.
  void override_with(Override fn);

  /// Calls `fn` in every call of every layer. It replaces a probe that a layer has.
  /// @param context also pass it every head's output: all heads then run
  void probe_with(const Probe& fn, bool context = false);
  /// Removes the probe.
  void stop_probing();

 private:
  struct Before {
    std::shared_ptr<GateImpl> gate;
    std::function<void(const AttentionProbe&)> probe;
    bool probe_context;
  };
  AttentionLayers layers_;
  std::vector<Before> before_;
};

}  // namespace headwise
