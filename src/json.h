// JSON that came from outside: what is wrong with it is said by name.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

namespace headwise {

using Json = nlohmann::ordered_json;

/// Parses `text`. `what` names it in messages. Nesting deeper than `max_depth` (a cheap way to make
/// a parser eat memory) and keys that occur twice (readers differ in which one they believe) are
/// refused.
/// @throws c10::ValueError
inline Json parse_json(std::string_view text, const std::string& what, int max_depth = 32) {
  std::vector<std::unordered_set<std::string>> keys;  // of the objects that are open
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    switch (event) {
      case Json::parse_event_t::object_start:
        keys.emplace_back();
        [[fallthrough]];
      case Json::parse_event_t::array_start:
        TORCH_CHECK_VALUE(depth < max_depth, what, " must not be nested deeper than ", max_depth);
        break;
      case Json::parse_event_t::object_end:
        keys.pop_back();
        break;
      case Json::parse_event_t::key: {
        const auto& key = parsed.get_ref<const std::string&>();
        TORCH_CHECK_VALUE(keys.back().insert(key).second, what, " has the key ", Json(key).dump(),
                          " twice");
        break;
      }
      default:
        break;
    }
    return true;
  };
  try {
    return Json::parse(text, check);
  } catch (const nlohmann::json::exception& error) {
    // Only the position and the reason: the library's own number means nothing to people, and what
    // it read last may be bytes that no terminal should see.
    std::string reason = error.what();
    if (const auto end = reason.find("] "); end != std::string::npos) reason.erase(0, end + 2);
    if (const auto end = reason.find("; last read"); end != std::string::npos) reason.resize(end);
    TORCH_CHECK_VALUE(false, what, " is not valid JSON: ", reason);
  }
}

/// Every key of `keys` and no other. @throws c10::ValueError naming the first that is not so.
inline void check_keys(const Json& object, std::initializer_list<const char*> keys,
                       const std::string& what) {
  TORCH_CHECK_VALUE(object.is_object(), what, " must be a JSON object, got ", object.type_name());
  const std::unordered_set<std::string> expected(keys.begin(), keys.end());
  for (const auto& [key, value] : object.items()) {
    TORCH_CHECK_VALUE(expected.count(key), what, " has an unknown key ", Json(key).dump());
  }
  for (const char* key : keys) {
    TORCH_CHECK_VALUE(object.contains(key), what, " lacks the key \"", key, "\"");
  }
}

/// The tag that every file of headwise starts with. @throws c10::ValueError
inline void check_format(const Json& object, const char* format, int version,
                         const std::string& what) {
  TORCH_CHECK_VALUE(object.is_object(), what, " must be a JSON object, got ", object.type_name());
  TORCH_CHECK_VALUE(object.contains("format") && object["format"] == format, what,
                    " must have \"format\": \"", format, "\"");
  TORCH_CHECK_VALUE(object.contains("version") && object["version"] == version, what,
                    " must have \"version\": ", version);
}

inline std::string get_string(const Json& object, const char* key, const std::string& what) {
  const Json& value = object.at(key);
  TORCH_CHECK_VALUE(value.is_string(), "\"", key, "\" of ", what, " must be a string, got ",
                    value.type_name());
  return value.get<std::string>();
}

inline const Json& get_array(const Json& object, const char* key, const std::string& what) {
  const Json& value = object.at(key);
  TORCH_CHECK_VALUE(value.is_array(), "\"", key, "\" of ", what, " must be an array, got ",
                    value.type_name());
  return value;
}

inline int64_t as_integer(const Json& value, const std::string& what) {
  TORCH_CHECK_VALUE(value.is_number_integer(), what, " must be integers, got ", value.dump());
  // What fits no signed 64-bit number is refused by whoever checks the range.
  if (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX}) return INT64_MAX;
  return value.get<int64_t>();
}

inline std::vector<double> get_numbers(const Json& object, const char* key,
                                       const std::string& what) {
  std::vector<double> numbers;
  for (const Json& value : get_array(object, key, what)) {
    TORCH_CHECK_VALUE(value.is_number(), "\"", key, "\" of ", what, " must hold numbers, got ",
                      value.dump());
    numbers.push_back(value.get<double>());
  }
  return numbers;
}

}  // namespace headwise
