// Gate options as tagged JSON, the form in which models are saved by either language.
#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>

#include "headwise/gates.h"

namespace headwise {
namespace {

using Json = nlohmann::ordered_json;

template <typename T>
struct IsOptional : std::false_type {};
template <typename T>
struct IsOptional<std::optional<T>> : std::true_type {};

// The fields of each type, named once for reading and writing: visit(field name, value).
template <typename Visit>
void fields(FixedGateOptions& o, Visit&& visit) {
  visit("heads", o.heads());
  visit("scale", o.scale());
  visit("execution", o.execution());
}

template <typename Visit>
void fields(RandomGateOptions& o, Visit&& visit) {
  visit("keep", o.keep());
  visit("per_input", o.per_input());
  visit("execution", o.execution());
}

template <typename Visit>
void fields(BudgetGateOptions& o, Visit&& visit) {
  visit("target", o.target());
  visit("target_scope", o.target_scope());
  visit("strength", o.strength());
  visit("warmup", o.warmup());
  visit("static_until", o.static_until());
  visit("hard_from", o.hard_from());
  visit("budget", o.budget());
  visit("min_budget", o.min_budget());
  visit("max_budget", o.max_budget());
  visit("initial_budget", o.initial_budget());
  visit("hidden_dim", o.hidden_dim());
  visit("min_heads", o.min_heads());
  visit("rounding", o.rounding());
  visit("bounds_strength", o.bounds_strength());
  visit("entropy_strength", o.entropy_strength());
  visit("temperature", o.temperature());
  visit("final_temperature", o.final_temperature());
  visit("noise", o.noise());
  visit("noise_scale", o.noise_scale());
  visit("relaxation", o.relaxation());
  visit("kept_weight", o.kept_weight());
  visit("execution", o.execution());
}

template <typename Visit>
void fields(HardConcreteGateOptions& o, Visit&& visit) {
  visit("target", o.target());
  visit("target_scope", o.target_scope());
  visit("strength", o.strength());
  visit("warmup", o.warmup());
  visit("static_until", o.static_until());
  visit("hard_from", o.hard_from());
  visit("input_dependent", o.input_dependent());
  visit("penalty", o.penalty());
  visit("kept_weight", o.kept_weight());
  visit("init_log_alpha", o.init_log_alpha());
  visit("beta", o.beta());
  visit("gamma", o.gamma());
  visit("zeta", o.zeta());
  visit("initial_target", o.initial_target());
  visit("execution", o.execution());
}

const char* type_name(const GateOptions& options) {
  constexpr const char* kNames[] = {"FixedGate", "RandomGate", "BudgetGate", "HardConcreteGate"};
  return kNames[options.index()];
}

template <typename Options>
GateOptions read(const Json& json, const char* type) {
  Options options;
  for (const auto& [key, value] : json.items()) {
    if (key == "type") {
      continue;
    }
    bool known = false;
    fields(options, [&, &key = key, &value = value](const char* name, auto& field) {
      if (key != name) {
        return;
      }
      known = true;
      using Field = std::decay_t<decltype(field)>;
      try {
        if constexpr (IsOptional<Field>::value) {
          field.reset();
          if (!value.is_null()) {
            field = value.template get<typename Field::value_type>();
          }
        } else {
          field = value.template get<Field>();
        }
      } catch (const Json::exception&) {
        TORCH_CHECK_VALUE(false, type, " option '", key,
                          "' has a value of the wrong kind: ", value.dump());
      }
    });
    TORCH_CHECK_VALUE(known, type, " has no option '", key, "'");
  }
  return options;
}

}  // namespace

std::string gate_options_to_json(const GateOptions& options) {
  Json json;
  json["type"] = type_name(options);
  auto copy = options;
  std::visit(
      [&](auto& typed) {
        fields(typed, [&](const char* name, const auto& field) {
          if constexpr (IsOptional<std::decay_t<decltype(field)>>::value) {
            json[name] = field ? Json(*field) : Json(nullptr);
          } else {
            json[name] = field;
          }
        });
      },
      copy);
  return json.dump();
}

GateOptions gate_options_from_json(std::string_view text) {
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::exception& error) {
    TORCH_CHECK_VALUE(false, "gate options must be JSON: ", error.what());
  }
  TORCH_CHECK_VALUE(json.is_object() && json.contains("type") && json["type"].is_string(),
                    "gate options must be an object with a 'type', got ", json.dump());
  const auto type = json["type"].get<std::string>();
  if (type == "FixedGate") return read<FixedGateOptions>(json, "FixedGate");
  if (type == "RandomGate") return read<RandomGateOptions>(json, "RandomGate");
  if (type == "BudgetGate") return read<BudgetGateOptions>(json, "BudgetGate");
  if (type == "HardConcreteGate") return read<HardConcreteGateOptions>(json, "HardConcreteGate");
  TORCH_CHECK_VALUE(false,
                    "gate type must be one of BudgetGate, FixedGate, HardConcreteGate, RandomGate, "
                    "got '",
                    type, "'");
}

}  // namespace headwise
