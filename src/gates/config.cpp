// Gate options as tagged JSON, the form in which models are saved by either language.
#include <c10/util/Exception.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "gates/options.h"

namespace headwise {
namespace {

using Json = nlohmann::ordered_json;

template <typename T>
struct IsOptional : std::false_type {};
template <typename T>
struct IsOptional<std::optional<T>> : std::true_type {};

template <typename Field>
void read_field(const Json& value, Field& field) {
  if constexpr (IsOptional<Field>::value) {
    field.reset();
    if (!value.is_null()) {
      field = value.template get<typename Field::value_type>();
    }
  } else if constexpr (IsInnerGate<Field>::value) {
    field.outer.gate(gate_options_from_json(value.dump()));
  } else {
    field = value.template get<Field>();
  }
}

template <typename Field>
Json write_field(const Field& field) {
  if constexpr (IsOptional<Field>::value) {
    return field ? Json(*field) : Json(nullptr);
  } else if constexpr (IsInnerGate<Field>::value) {
    const auto& box = field.outer.gate();
    return box ? Json::parse(gate_options_to_json(box->options)) : Json(nullptr);
  } else {
    return Json(field);
  }
}

template <typename Options>
GateOptions read(const Json& json) {
  const char* type = GateFields<Options>::kType;
  Options options;
  for (const auto& [key, value] : json.items()) {
    if (key == "type") {
      continue;
    }
    bool known = false;
    GateFields<Options>::visit(
        options, [&, &key = key, &value = value](const char* name, auto& field) {
          if (key != name) {
            return;
          }
          known = true;
          try {
            read_field(value, field);
          } catch (const Json::exception&) {
            TORCH_CHECK_VALUE(false, type, " option '", key,
                              "' has a value of the wrong kind: ", value.dump());
          }
        });
    TORCH_CHECK_VALUE(known, type, " has no option '", key, "'");
  }
  return options;
}

template <size_t... I>
GateOptions read_any(const Json& json, const std::string& type, std::index_sequence<I...>) {
  std::optional<GateOptions> found;
  std::vector<std::string> names;
  const auto consider = [&]<typename Options>(std::type_identity<Options>) {
    names.emplace_back(GateFields<Options>::kType);
    if (type == names.back()) {
      found = read<Options>(json);
    }
  };
  (consider(std::type_identity<std::variant_alternative_t<I, GateOptions>>{}), ...);
  if (!found) {
    std::sort(names.begin(), names.end());
    std::string listed;
    for (const auto& name : names) {
      listed += (listed.empty() ? "" : ", ") + name;
    }
    TORCH_CHECK_VALUE(false, "gate type must be one of ", listed, ", got '", type, "'");
  }
  return *found;
}

}  // namespace

std::string gate_options_to_json(const GateOptions& options) {
  return std::visit(
      []<typename Options>(const Options& typed) {
        Json json;
        json["type"] = GateFields<Options>::kType;
        GateFields<Options>::visit(
            typed, [&](const char* name, const auto& field) { json[name] = write_field(field); });
        return json.dump();
      },
      options);
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
  return read_any(json, json["type"].get<std::string>(),
                  std::make_index_sequence<std::variant_size_v<GateOptions>>{});
}

}  // namespace headwise
