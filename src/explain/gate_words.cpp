#include "explain/gate_words.h"

#include <cctype>
#include <sstream>

namespace headwise {
namespace {

std::string text_of(double value) {
  std::ostringstream stream;
  stream.precision(4);
  stream << value;
  return stream.str();
}

std::string heads_text(const Json& heads) {
  std::string list;
  for (size_t i = 0; i < heads.size(); ++i) {
    list += i == 0 ? "" : i + 1 == heads.size() ? " and " : ", ";
    list += std::to_string(heads[i].get<int64_t>());
  }
  return (heads.size() == 1 ? "head " : "heads ") + list;
}

std::string at_least(const Json& config) {
  const auto least = config.value("min_heads", int64_t{1});
  if (least == 0) return ".";
  return "; at least " + std::to_string(least) + (least == 1 ? " head runs." : " heads run.");
}

}  // namespace

std::string how_it_decides(const Json& config, double threshold, bool ranks) {
  const std::string type = config.value("type", "");
  const bool of_model = config.value("scope", "layer") == "model";
  const std::string heads = of_model ? "heads of all layers" : "layer's heads";
  if (type.empty()) return "There is no gate: every head runs for every input.";
  if (type == "FixedGate") return "The same heads run for every input: they were fixed beforehand.";
  if (type == "RandomGate") {
    return config.value("per_input", true)
               ? "Heads are drawn at random for every input, independently of its content."
               : "Heads were drawn at random once: the same ones run for every input.";
  }
  if (type == "BudgetGate") {
    const auto fixed = config.find("budget");
    return fixed != config.end() && fixed->is_number()
               ? "Every input is given the same budget, " + text_of(fixed->get<double>()) +
                     " of the layer's heads, and those most relevant to it run."
               : "A network gives every input a budget, and within it the layer's heads most "
                 "relevant to the input run.";
  }
  if (type == "HardConcreteGate") {
    return "A head runs if its relevance is above " + text_of(threshold) +
           (config.value("input_dependent", false)
                ? "; the input decides, whatever the other heads' relevance."
                : "; that was learned in training and is the same for every input.");
  }
  if (type == "GumbelSigmoidGate") {
    return "A head runs if its relevance is above 0, that is, if the probability that it is "
           "open is above one half.";
  }
  if (type == "SubsetGate") {
    return "The " + heads + " with the largest scores run, the same for every input: the scores " +
           "were learned in training.";
  }
  if (type == "RequestedBudgetGate") {
    return of_model ? "The budget is requested at run time and divided among the layers by "
                      "learned scores; within its part a layer runs the heads most relevant to the "
                      "input."
                    : "The budget is requested at run time, and within it the layer's heads most "
                      "relevant to the input run.";
  }
  if (type == "SleepGate") {
    return "Training put the " + heads +
           " that moved the loss least to sleep, and they sleep for every input; relevance is how "
           "much a head moved the loss, a running average.";
  }
  if (type == "ThresholdGate") {
    return "Nothing was learned: a head runs if the integer parts of its queries and keys give "
           "scores for this input whose size (its relevance) is above " +
           text_of(threshold) + at_least(config);
  }
  if (type == "SharedHeadsGate" && config.contains("gate") && config.contains("shared")) {
    if (config["shared"].empty()) return how_it_decides(config["gate"], threshold, ranks);
    std::string inner = how_it_decides(config["gate"], threshold, ranks);
    inner[0] = static_cast<char>(std::tolower(static_cast<unsigned char>(inner[0])));
    std::string shared = heads_text(config["shared"]);
    shared[0] = 'H';
    return shared + (config["shared"].size() == 1 ? " runs" : " run") +
           " for every input; of the others: " + inner;
  }
  return ranks ? "A custom gate, " + type + ": its relevance is known, but not how it is computed."
               : "A custom gate, " + type + ", which gives heads no relevance.";
}

}  // namespace headwise
