// Gates' options: checked by their tables, read and written as tagged JSON, the form in which
// models are saved by either language.
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <type_traits>

#include "gates/options.h"
#include "json.h"

namespace headwise {
namespace {

using Kind = OptionRule::Kind;

template <typename T>
struct IsOptional : std::false_type {};
template <typename T>
struct IsOptional<std::optional<T>> : std::true_type {};
template <typename T>
struct IsVector : std::false_type {};
template <typename T>
struct IsVector<std::vector<T>> : std::true_type {};

// "one_of(T)": a type known as "float", "int", "bool", "str", "gate" or a list of one of them.
template <typename T>
std::string type_name() {
  if constexpr (IsOptional<T>::value) {
    return type_name<typename T::value_type>() + " | None";
  } else if constexpr (IsVector<T>::value) {
    return "list[" + type_name<typename T::value_type>() + "]";
  } else if constexpr (std::is_same_v<T, bool>) {
    return "bool";
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return "int";
  } else if constexpr (std::is_same_v<T, double>) {
    return "float";
  } else if constexpr (std::is_same_v<T, std::string>) {
    return "str";
  } else {
    return "Gate";
  }
}

std::string rule_text(const OptionRule& rule) {
  switch (rule.kind) {
    case Kind::kFraction:
      return "in (0, 1]";
    case Kind::kUnit:
      return "between 0 and 1";
    case Kind::kDecay:
      return "in [0, 1)";
    case Kind::kRatio:
      return "in (-1, 1)";
    case Kind::kFinite:
      return "finite";
    case Kind::kPositive:
      return "positive and finite";
    case Kind::kNotNegative:
      return "finite and not negative";
    case Kind::kAtLeast:
      return "at least " + std::to_string(rule.least);
    case Kind::kChoice:
      return std::string("one of ") + rule.choices;
    case Kind::kHeads:
      return "in 0..H-1";
    case Kind::kNone:
      return "";
  }
  return "";
}

bool fits(double value, Kind kind) {
  switch (kind) {
    case Kind::kFraction:
      return value > 0.0 && value <= 1.0;
    case Kind::kUnit:
      return value >= 0.0 && value <= 1.0;
    case Kind::kDecay:
      return value >= 0.0 && value < 1.0;
    case Kind::kRatio:
      return value > -1.0 && value < 1.0;
    case Kind::kPositive:
      return value > 0.0 && std::isfinite(value);
    case Kind::kNotNegative:
      return value >= 0.0 && std::isfinite(value);
    default:
      return std::isfinite(value);
  }
}

bool is_choice(const std::string& value, std::string_view choices) {
  while (true) {
    const auto end = choices.find(", ");
    if (value == choices.substr(0, end)) return true;
    if (end == std::string_view::npos) return false;
    choices.remove_prefix(end + 2);
  }
}

template <typename T>
void check(const char* name, const T& value, const OptionRule& rule) {
  if constexpr (IsOptional<T>::value) {
    if (value) check(name, *value, rule);
  } else if constexpr (IsVector<T>::value) {
    TORCH_CHECK_VALUE(value.size() <= kMostHeads, name, " must have at most ", kMostHeads,
                      " values, got ", value.size());
    std::set<typename T::value_type> seen;
    for (const auto item : value) {
      check(name, item, rule);
      TORCH_CHECK_VALUE(seen.insert(item).second || rule.kind != Kind::kHeads, name,
                        " must not name a head twice, got ", item, " again");
    }
  } else if constexpr (std::is_same_v<T, double>) {
    TORCH_CHECK_VALUE(fits(value, rule.kind), name, " must be ", rule_text(rule), ", got ",
                      shown_json(Json(value)));
  } else if constexpr (std::is_same_v<T, int64_t>) {
    const int64_t most = rule.kind == Kind::kHeads ? kMostHeads - 1 : kLargest;
    TORCH_CHECK_VALUE(value >= rule.least && (rule.kind != Kind::kHeads || value <= most), name,
                      " must be ", rule_text(rule), ", got ", value);
    TORCH_CHECK_VALUE(value <= most, name, " must be at most ", most, ", got ", value);
  } else if constexpr (std::is_same_v<T, std::string>) {
    TORCH_CHECK_VALUE(is_choice(value, rule.choices), name, " must be ", rule_text(rule), ", got ",
                      shown_json(Json(value)));
  } else if constexpr (std::is_same_v<T, GateOptionsBox>) {
    TORCH_CHECK_VALUE(value.get() != nullptr, name, " must be given");
    check_gate_options(value.get()->options);
  }
}

// Rules that involve several options.
template <typename Options>
void check_together(const Options&) {}

void check_together(const FixedGateOptions& o) {
  TORCH_CHECK_VALUE(!(o.heads() && o.scale()), "heads and scale must not both be given");
}

void check_together(const BudgetGateOptions& o) {
  TORCH_CHECK_VALUE(o.min_budget() <= o.max_budget(),
                    "min_budget must not be above max_budget, got ",
                    shown_json(Json(o.min_budget())), " and ", shown_json(Json(o.max_budget())));
  const BudgetGateOptions initial;
  if (o.budget()) {
    TORCH_CHECK_VALUE(o.keep() == initial.keep(),
                      "keep and budget must not both be given, got keep=",
                      shown_json(Json(o.keep())), " and budget=", shown_json(Json(*o.budget())));
    TORCH_CHECK_VALUE(o.min_budget() == initial.min_budget() &&
                          o.max_budget() == initial.max_budget() && !o.hidden_dim(),
                      "min_budget, max_budget and hidden_dim belong to a predicted budget and must "
                      "not be given with budget=",
                      shown_json(Json(*o.budget())));
    return;
  }
  TORCH_CHECK_VALUE(o.min_budget() <= o.keep() && o.keep() <= o.max_budget(),
                    "keep must lie between min_budget=", shown_json(Json(o.min_budget())),
                    " and max_budget=", shown_json(Json(o.max_budget())), ", got ",
                    shown_json(Json(o.keep())));
}

void check_together(const SubsetGateOptions& o) {
  TORCH_CHECK_VALUE(!o.k() || o.keep() == SubsetGateOptions().keep(),
                    "k and keep must not both be given, got k=", o.k().value_or(0),
                    " and keep=", shown_json(Json(o.keep())));
}

void check_together(const RequestedBudgetGateOptions& o) {
  TORCH_CHECK_VALUE(o.min_budget() <= o.max_budget(),
                    "min_budget must not be above max_budget, got ",
                    shown_json(Json(o.min_budget())), " and ", shown_json(Json(o.max_budget())));
}

void check_together(const HardConcreteGateOptions& o) {
  TORCH_CHECK_VALUE(o.gamma() < 0.0 && o.zeta() > 1.0,
                    "gamma must be below 0 and zeta above 1, got ", shown_json(Json(o.gamma())),
                    " and ", shown_json(Json(o.zeta())));
  TORCH_CHECK_VALUE(o.penalty() != "l0" || o.keep() == HardConcreteGateOptions().keep(),
                    "keep must not be given with penalty='l0', which has no target: strength "
                    "decides how many heads close, got keep=",
                    shown_json(Json(o.keep())));
}

// --- JSON ---

template <typename T>
void read(const char* name, const Json& value, T& field, const OptionRule& rule, int depth) {
  if constexpr (IsOptional<T>::value) {
    field.reset();
    if (!value.is_null()) read(name, value, field.emplace(), rule, depth);
  } else if constexpr (IsVector<T>::value) {
    field.clear();
    if (rule.kind == Kind::kHeads && value.is_number_integer() &&
        std::string_view(name) == "shared") {
      const auto count = value.get<int64_t>();
      TORCH_CHECK_VALUE(count >= 0 && count <= kMostHeads, name, " must be in 0..", kMostHeads,
                        ", got ", shown_json(Json(value)));
      for (int64_t head = 0; head < count; ++head) field.push_back(head);
      return;
    }
    TORCH_CHECK_TYPE(value.is_array(), name, " must be a sequence of numbers, got ",
                     shown_json(Json(value)));
    TORCH_CHECK_VALUE(value.size() <= kMostHeads, name, " must have at most ", kMostHeads,
                      " values, got ", value.size());
    for (const auto& item : value) read(name, item, field.emplace_back(), rule, depth);
  } else if constexpr (std::is_same_v<T, bool>) {
    TORCH_CHECK_TYPE(value.is_boolean(), name, " must be True or False, got ",
                     shown_json(Json(value)));
    field = value.get<bool>();
  } else if constexpr (std::is_same_v<T, std::string>) {
    TORCH_CHECK_VALUE(value.is_string(), name, " must be ", rule_text(rule), ", got ",
                      shown_json(Json(value)));
    field = value.get<std::string>();
  } else if constexpr (std::is_same_v<T, GateOptionsBox>) {
    field = GateOptionsBox(gate_options_from_object(value, depth + 1));
  } else {
    TORCH_CHECK_TYPE(value.is_number(), name, " must be a number, got ", shown_json(Json(value)));
    if constexpr (std::is_same_v<T, int64_t>) {
      const double number = value.get<double>();
      TORCH_CHECK_VALUE(std::floor(number) == number && std::isfinite(number), name,
                        " must be a whole number, got ", shown_json(Json(value)));
      TORCH_CHECK_VALUE(std::abs(number) <= kLargest, name, " must be between ", -kLargest, " and ",
                        kLargest, ", got ", shown_json(Json(value)));
    }
    field = value.get<T>();
  }
}

template <typename T>
Json written(const T& field) {
  if constexpr (IsOptional<T>::value) {
    return field ? Json(*field) : Json(nullptr);
  } else if constexpr (std::is_same_v<T, GateOptionsBox>) {
    return field.get() == nullptr ? Json(nullptr) : gate_options_to_object(field.get()->options);
  } else {
    return Json(field);
  }
}

template <typename Options>
GateOptions read_options(const Json& object, int depth) {
  Options options;
  std::string listed;
  std::set<std::string> known{"type"};
  Options::visit(options, [&](const char* name, auto& field, const OptionRule& rule, const char*) {
    known.insert(name);
    listed += (listed.empty() ? "" : ", ") + std::string(name);
    if (const auto found = object.find(name); found != object.end()) {
      read(name, *found, field, rule, depth);
    }
  });
  for (const auto& [key, value] : object.items()) {
    TORCH_CHECK_VALUE(known.contains(key), Options::kType, " has no option ", shown_json(Json(key)),
                      "; it has ", listed);
  }
  return options;
}

// Calls use(std::type_identity<Options>()) for the options of every gate, in alphabetical order.
template <typename Use>
void for_each_gate(Use&& use) {
  use(std::type_identity<BudgetGateOptions>());
  use(std::type_identity<FixedGateOptions>());
  use(std::type_identity<GroupGateOptions>());
  use(std::type_identity<GumbelSigmoidGateOptions>());
  use(std::type_identity<HardConcreteGateOptions>());
  use(std::type_identity<RandomGateOptions>());
  use(std::type_identity<RequestedBudgetGateOptions>());
  use(std::type_identity<SharedHeadsGateOptions>());
  use(std::type_identity<SleepGateOptions>());
  use(std::type_identity<SubsetGateOptions>());
  use(std::type_identity<ThresholdGateOptions>());
}

}  // namespace

void check_gate_options(const GateOptions& options) {
  std::visit(
      []<typename Options>(const Options& typed) {
        Options::visit(typed, [](const char* name, const auto& field, const OptionRule& rule,
                                 const char*) { check(name, field, rule); });
        check_together(typed);
      },
      options);
}

Json gate_options_to_object(const GateOptions& options) {
  return std::visit(
      []<typename Options>(const Options& typed) {
        Json json;
        json["type"] = Options::kType;
        Options::visit(typed, [&](const char* name, const auto& field, const OptionRule&,
                                  const char*) { json[name] = written(field); });
        return json;
      },
      options);
}

std::string changed_options(const GateOptions& options) {
  const Json own = gate_options_to_object(options);
  const Json initial = std::visit(
      []<typename Options>(const Options&) { return gate_options_to_object(Options()); }, options);
  std::string text;
  for (const auto& [key, value] : own.items()) {
    if (value != initial[key] && !value.is_object()) text += ", " + key + "=" + value.dump();
  }
  return text;
}

GateOptions gate_options_from_object(const Json& object, int depth) {
  TORCH_CHECK_VALUE(object.is_object(), "a gate's configuration must be a mapping, got ",
                    shown_json(object));
  TORCH_CHECK_VALUE(depth < kMostNested, "gates must not be nested more than ", kMostNested,
                    " deep");
  const auto type = object.find("type");
  std::optional<GateOptions> found;
  std::string listed;
  for_each_gate([&]<typename Options>(std::type_identity<Options>) {
    listed += (listed.empty() ? "" : ", ") + std::string(Options::kType);
    if (type != object.end() && *type == Options::kType) {
      found = read_options<Options>(object, depth);
    }
  });
  TORCH_CHECK_VALUE(found, "gate type must be one of ", listed, ", got ",
                    shown_json(type == object.end() ? Json() : *type));
  check_gate_options(*found);
  return *found;
}

std::string gate_options_to_json(const GateOptions& options) {
  return gate_options_to_object(options).dump();
}

GateOptions gate_options_from_json(std::string_view text) {
  Json json;
  try {
    json = Json::parse(text, [](int depth, Json::parse_event_t, Json&) {
      TORCH_CHECK_VALUE(depth <= 4 * kMostNested, "gate options must not be nested so deeply");
      return true;
    });
  } catch (const Json::exception& error) {
    TORCH_CHECK_VALUE(false,
                      "gate options must be JSON: ", std::string(error.what()).substr(0, 200));
  }
  return gate_options_from_object(json);
}

std::vector<std::pair<std::string, std::vector<OptionRow>>> gate_tables() {
  std::vector<std::pair<std::string, std::vector<OptionRow>>> tables;
  for_each_gate([&]<typename Options>(std::type_identity<Options>) {
    std::vector<OptionRow> rows;
    const Options initial;
    Options::visit(initial, [&]<typename T>(const char* name, const T& field,
                                            const OptionRule& rule, const char* doc) {
      rows.push_back({name, type_name<T>(), written(field), rule_text(rule), doc});
    });
    tables.emplace_back(Options::kType, std::move(rows));
  });
  return tables;
}

}  // namespace headwise
