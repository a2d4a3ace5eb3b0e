// Untrusted JSON: errors name what is wrong.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_set>
#include <vector>

#include "shown.h"

namespace headwise {

using Json = nlohmann::ordered_json;  // objects keep the order of their keys, and search in it

/// Objects with more keys are refused if the order of keys is kept: each lookup is then a linear
/// search.
constexpr size_t kMostKeys = 10'000;
constexpr int kDeepest = 32;

/// A value for a message, spelled as in Python: at most about 60 characters, none of them a control
/// character.
template <typename AnyJson>
std::string shown_json(const AnyJson& value) {
  constexpr size_t kMost = 60;
  if (value.is_string()) return shown(value.template get_ref<const std::string&>(), kMost, '\'');
  if (value.is_boolean()) return value.template get<bool>() ? "True" : "False";
  if (value.is_null()) return "None";
  if (value.is_structured()) {
    return (value.is_array() ? "a list of " : "a mapping of ") + std::to_string(value.size());
  }
  if (value.is_number_float() && !std::isfinite(value.template get<double>())) {
    const double number = value.template get<double>();
    return std::isnan(number) ? "nan" : number > 0 ? "inf" : "-inf";
  }
  return value.dump();
}

/// Refuses what parse_json() refuses besides invalid JSON. A separate pass: with a callback the
/// library's parser walks an object again after each of its values.
template <typename AnyJson>
class JsonChecker : public nlohmann::json_sax<AnyJson> {
 public:
  JsonChecker(std::string_view what, int max_depth) : what_(what), max_depth_(max_depth) {}

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(typename AnyJson::number_integer_t) override { return true; }
  bool number_unsigned(typename AnyJson::number_unsigned_t) override { return true; }
  bool number_float(typename AnyJson::number_float_t, const std::string&) override { return true; }
  bool string(std::string&) override { return true; }
  bool binary(typename AnyJson::binary_t&) override { return true; }
  bool start_object(size_t) override {
    keys_.emplace_back();
    return open();
  }
  bool end_object() override {
    keys_.pop_back();
    return close();
  }
  bool start_array(size_t) override { return open(); }
  bool end_array() override { return close(); }
  bool key(std::string& key) override {
    TORCH_CHECK_VALUE(keys_.back().insert(key).second, what_, " has the key ", shown(key),
                      " twice");
    TORCH_CHECK_VALUE((!std::is_same_v<AnyJson, Json> || keys_.back().size() <= kMostKeys), what_,
                      " must not have more than ", kMostKeys, " keys in one object");
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::json::exception&) override {
    return false;  // the parser says more
  }

 private:
  bool open() {
    TORCH_CHECK_VALUE(depth_++ < max_depth_, what_, " must not be nested deeper than ", max_depth_);
    return true;
  }
  bool close() {
    --depth_;
    return true;
  }

  std::string_view what_;
  int max_depth_, depth_ = 0;
  std::vector<std::unordered_set<std::string>> keys_;  // of the objects that are open
};

/// Parses `text`. `what` names it in messages. Nesting deeper than `max_depth` (a cheap way to make
/// a parser eat memory), keys that occur twice (readers differ in which one they believe) and bytes
/// of value 0 (at which some readers stop) are refused.
/// @throws c10::ValueError
template <typename AnyJson = Json>
AnyJson parse_json(std::string_view text, std::string_view what, int max_depth = kDeepest) {
  TORCH_CHECK_VALUE(text.find('\0') == std::string_view::npos, what,
                    " is not valid JSON: it must not hold a byte of value 0, got one at byte ",
                    text.find('\0'));
  JsonChecker<AnyJson> checker(what, max_depth);
  try {
    AnyJson::sax_parse(text, &checker);
    return AnyJson::parse(text);
  } catch (const nlohmann::json::exception& error) {
    // Only the position and the reason: the library's error number means nothing to users, and the
    // text it quotes may contain control characters.
    std::string reason = error.what();
    if (const auto end = reason.find("] "); end != std::string::npos) reason.erase(0, end + 2);
    if (const auto end = reason.find("; last read"); end != std::string::npos) reason.resize(end);
    if (reason.size() > 200) reason.resize(200);  // it quotes numbers of any length
    TORCH_CHECK_VALUE(false, what, " is not valid JSON: ", reason);
  }
}

/// Requires every key of `keys` and no other. @throws c10::ValueError naming the first missing or
/// unknown one.
template <typename AnyJson>
void check_keys(const AnyJson& object, std::initializer_list<const char*> keys,
                std::string_view what) {
  TORCH_CHECK_VALUE(object.is_object(), what, " must be a JSON object, got ", object.type_name());
  const std::unordered_set<std::string> expected(keys.begin(), keys.end());
  for (const auto& [key, value] : object.items()) {
    TORCH_CHECK_VALUE(expected.count(key), what, " has an unknown key ", shown(key));
  }
  for (const char* key : keys) {
    TORCH_CHECK_VALUE(object.contains(key), what, " lacks the key \"", key, "\"");
  }
}

/// The tag that every file of headwise starts with. @throws c10::ValueError
inline void check_format(const Json& object, const char* format, int version,
                         std::string_view what) {
  TORCH_CHECK_VALUE(object.is_object(), what, " must be a JSON object, got ", object.type_name());
  TORCH_CHECK_VALUE(object.contains("format") && object["format"] == format, what,
                    " must have \"format\": \"", format, "\"");
  TORCH_CHECK_VALUE(object.contains("version") && object["version"].is_number_integer() &&
                        object["version"] == version,
                    what, " must have \"version\": ", version);
}

template <typename AnyJson>
std::string get_string(const AnyJson& object, const char* key, std::string_view what) {
  const auto& value = object.at(key);
  TORCH_CHECK_VALUE(value.is_string(), "\"", key, "\" of ", what, " must be a string, got ",
                    value.type_name());
  return value.template get<std::string>();
}

inline const Json& get_array(const Json& object, const char* key, std::string_view what) {
  const Json& value = object.at(key);
  TORCH_CHECK_VALUE(value.is_array(), "\"", key, "\" of ", what, " must be an array, got ",
                    value.type_name());
  return value;
}

inline int64_t as_integer(const Json& value, std::string_view what) {
  TORCH_CHECK_VALUE(value.is_number_integer(), what, " must be integers, got ", shown_json(value));
  // A number that does not fit 64 bits is refused by the caller's range check.
  if (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX}) return INT64_MAX;
  return value.get<int64_t>();
}

inline std::vector<double> get_numbers(const Json& object, const char* key, std::string_view what) {
  std::vector<double> numbers;
  for (const Json& value : get_array(object, key, what)) {
    TORCH_CHECK_VALUE(value.is_number(), "\"", key, "\" of ", what, " must hold numbers, got ",
                      shown_json(value));
    numbers.push_back(value.get<double>());
  }
  return numbers;
}

}  // namespace headwise
