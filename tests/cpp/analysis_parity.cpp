// Runs every analysis and search of the C++ API on models that Python saved, for
// tests/python/cpp/test_cpp_analyses.py, and writes what it found.
//
//   analysis_parity FOLDER
//
// FOLDER/plain, FOLDER/gated, FOLDER/threshold   models of two attention layers ("layers.0",
//                          "layers.1"), added to their input one after the other, and a classifier
//                          ("head") of the first token; float64. Without gates, with gates that
//                          have a relevance, with ThresholdGate.
// FOLDER/data.safetensors  "x.N" [B, L, D], "padding.N" bool [B, L], "labels.N" int64 [B]
// FOLDER/found.json, FOLDER/found.safetensors    what is written
#include <cmath>
#include <fstream>
#include <string>

#include "headwise/headwise.h"
#include "parity.h"

namespace {

using parity::Json;

struct Batch {
  at::Tensor x, padding, labels;
};

struct Problem {
  headwise::Model model;
  std::vector<Batch> batches;

  at::Tensor logits(const at::Tensor& x_, const at::Tensor& padding) const {
    at::Tensor x = x_;
    for (const auto& [name, layer] : model.layers) {
      x = x + std::get<0>(layer.ptr()->forward(x, x, x, padding, /*need_weights=*/false));
    }
    return at::linear(x.select(1, 0), model.tensor("head.weight"), model.tensor("head.bias"));
  }
  headwise::BatchLoss loss_fn() const {
    return [this](int64_t i) {
      const Batch& batch = batches.at(i);
      return at::cross_entropy_loss(logits(batch.x, batch.padding), batch.labels, {},
                                    at::Reduction::None);
    };
  }
  int64_t size() const { return static_cast<int64_t>(batches.size()); }
};

Problem read(const std::string& folder, const std::string& name) {
  Problem problem{headwise::load(folder + "/" + name), {}};
  const auto data = headwise::load_safetensors(folder + "/data.safetensors").tensors;
  for (int64_t i = 0; data.count("x." + std::to_string(i)); ++i) {
    const std::string number = "." + std::to_string(i);
    problem.batches.push_back(
        {data.at("x" + number), data.at("padding" + number), data.at("labels" + number)});
  }
  return problem;
}

Json scored(const Problem& plain) {
  Json json;
  const std::map<std::string, headwise::AbsoluteValue> places{
      {"per_token", headwise::AbsoluteValue::per_token},
      {"per_example", headwise::AbsoluteValue::per_example},
      {"per_batch", headwise::AbsoluteValue::per_batch}};
  for (const auto& [name, absolute] : places) {
    const auto found = headwise::score_heads(
        plain.model.layers, plain.size(), plain.loss_fn(),
        {"michel", "entropy", "attention_confidence", "hies"},
        headwise::ScoreOptions().absolute(absolute).alpha(0.3).scope(headwise::Scope::layer));
    for (const auto& [metric, scores] : found) json[name][metric] = scores.values;
  }
  return json;
}

/// JSON has no infinity.
double finite(double value) { return std::isinf(value) ? 1e300 : value; }

Json staged(Problem& gated) {
  std::vector<headwise::PolicyBatch> batches;
  for (const Batch& batch : gated.batches) {
    batches.push_back({batch.x.size(0),
                       [&gated, batch](const at::Tensor& rows) {
                         return gated.logits(batch.x.index_select(0, rows),
                                             batch.padding.index_select(0, rows));
                       },
                       batch.labels});
  }
  headwise::ConfidencePolicy policy(gated.model.layers,
                                    headwise::ConfidencePolicyOptions().factors({0.4, 1.0, 1.7}));
  Json json;
  json["fit"] = finite(policy.fit(batches, 5.0));
  const auto fitted = policy.fit_accuracy(batches, 0.1, 0.6);
  json["fitted"] = {finite(fitted.threshold), fitted.heads, fitted.accuracy, fitted.widest_heads,
                    fitted.widest_accuracy};
  const auto seen = policy.predict(batches[0]);
  json["stage"] = std::vector<int64_t>(seen.stage.const_data_ptr<int64_t>(),
                                       seen.stage.const_data_ptr<int64_t>() + seen.stage.numel());
  const at::Tensor total = seen.total_heads();
  json["total"] = std::vector<int64_t>(total.const_data_ptr<int64_t>(),
                                       total.const_data_ptr<int64_t>() + total.numel());
  for (int64_t row = 0; row < batches[0].size; ++row) json["reasons"].push_back(seen.reason(row));
  return json;
}

void run(const std::string& folder) {
  Problem plain = read(folder, "plain");
  Json json;
  headwise::NamedTensors tensors;
  {
    torch::NoGradGuard no_grad;
    tensors["logits"] = plain.logits(plain.batches[0].x, plain.batches[0].padding);
  }
  json["scores"] = scored(plain);
  Problem threshold = read(folder, "threshold");
  json["threshold"] = headwise::calibrate_threshold(
      threshold.model.layers,
      [&] {
        for (const Batch& batch : threshold.batches) threshold.logits(batch.x, batch.padding);
      },
      0.5);
  Problem gated = read(folder, "gated");
  json["policy"] = staged(gated);

  std::ofstream(folder + "/found.json") << json.dump(1);
  headwise::save_safetensors(folder + "/found.safetensors", tensors);
}

}  // namespace

int main(int argc, char** argv) {
  return parity::main(argc == 2, "analysis_parity FOLDER", [&] { run(argv[1]); });
}
