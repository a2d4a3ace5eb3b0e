#include "options.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <map>

#include "report.h"

namespace bench {

const char* const kUsage = R"(usage: headwise_bench WHAT... [options]

Times what choosing heads costs a C++ program, gate included, relative to layers that physically have
the same number of heads. Every contender is checked against the oracle (compute every head, weight,
project) before it is timed; contenders alternate. `headwise bench` does the same from Python, and more.

WHAT: any of
  layer      one layer's forward
  train      forward and backward, running the chosen heads only
  gate       gates alone, over the dense layer
  entropy    attention_entropy over scaled_dot_product_attention

options:
  --shapes B,L,D,H ...   default: those of docs/benchmarks.md
  --dtype NAME ...       float64, float32, bfloat16, float16; default: float32 bfloat16
  --fractions SHARE ...  of the heads that run; default: 0.25 0.5 0.75 1
  --threads N ...        default: 1
  --rounds N             default: 11
  --most-seconds S       rounds of one case end after so long, three in any case; default: no limit
  --clock wall|process   process: processor time of all threads, for shared machines
  --seed N               default: 0
  --note TEXT            stored in the results
  --json FILE            write the results
)";

namespace {

/// A number that ends where the text does.
template <typename T, typename Parse>
T number(const std::string& option, const std::string& text, const Parse& parse) {
  size_t end = 0;
  T value{};
  try {
    value = static_cast<T>(parse(text, &end));
  } catch (const std::exception&) {
    end = 0;
  }
  if (text.empty() || end != text.size())
    throw UsageError(option + " must be a number, got '" + text + "'");
  return value;
}

int64_t whole(const std::string& option, const std::string& text, int64_t least) {
  const auto value = number<int64_t>(
      option, text, [](const std::string& t, size_t* end) { return std::stoll(t, end); });
  if (value < least)
    throw UsageError(option + " must be at least " + std::to_string(least) + ", got " + text);
  return value;
}

double share(const std::string& option, const std::string& text) {
  const auto value = number<double>(
      option, text, [](const std::string& t, size_t* end) { return std::stod(t, end); });
  if (!(value > 0 && value <= 1)) throw UsageError(option + " must be in (0, 1], got " + text);
  return value;
}

Shape shape(const std::string& text) {
  std::vector<int64_t> sizes;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    sizes.push_back(whole("--shapes", text.substr(at, end - at), 1));
    at = end + 1;
  }
  if (sizes.size() != 4)
    throw UsageError("--shapes takes B,L,D,H, four positive numbers, got '" + text + "'");
  if (sizes[2] % sizes[3]) throw UsageError("H must divide D, got '" + text + "'");
  return {sizes[0], sizes[1], sizes[2], sizes[3]};
}

at::ScalarType dtype(const std::string& text) {
  static const std::map<std::string, at::ScalarType> types{{"float64", at::kDouble},
                                                           {"float32", at::kFloat},
                                                           {"bfloat16", at::kBFloat16},
                                                           {"float16", at::kHalf}};
  const auto found = types.find(text);
  if (found == types.end())
    throw UsageError("--dtype must be float64, float32, bfloat16 or float16, got '" + text + "'");
  return found->second;
}

}  // namespace

std::string Shape::text() const {
  return std::to_string(batch) + "," + std::to_string(length) + "," + std::to_string(width) + "," +
         std::to_string(heads);
}

Options parse(int count, char** words) {
  Options options;
  for (const auto& shape : table().at("shapes")) {
    const auto& s = shape.at("sizes");
    options.shapes.push_back({s[0], s[1], s[2], s[3]});
  }
  options.fractions = table().at("fractions").get<std::vector<double>>();
  using Take = std::function<void(const std::string&)>;
  struct Rule {
    bool many;
    std::function<void()> begin;  // forgets the default
    Take take;
  };
  const auto nothing = [] {};
  const std::map<std::string, Rule> rules{
      {"--shapes",
       {true, [&] { options.shapes.clear(); },
        [&](const std::string& text) { options.shapes.push_back(shape(text)); }}},
      {"--dtype",
       {true, [&] { options.dtypes.clear(); },
        [&](const std::string& text) { options.dtypes.push_back(dtype(text)); }}},
      {"--fractions",
       {true, [&] { options.fractions.clear(); },
        [&](const std::string& text) { options.fractions.push_back(share("--fractions", text)); }}},
      {"--threads",
       {true, [&] { options.threads.clear(); },
        [&](const std::string& text) {
          options.threads.push_back(static_cast<int>(whole("--threads", text, 1)));
        }}},
      {"--rounds",
       {false, nothing,
        [&](const std::string& text) {
          options.rounds = static_cast<int>(whole("--rounds", text, 1));
        }}},
      {"--most-seconds",
       {false, nothing,
        [&](const std::string& text) {
          options.most_seconds = static_cast<double>(whole("--most-seconds", text, 1));
        }}},
      {"--clock",
       {false, nothing,
        [&](const std::string& text) {
          if (text != "wall" && text != "process")
            throw UsageError("--clock must be wall or process, got '" + text + "'");
          options.process_clock = text == "process";
        }}},
      {"--seed",
       {false, nothing, [&](const std::string& text) { options.seed = whole("--seed", text, 0); }}},
      {"--note", {false, nothing, [&](const std::string& text) { options.note = text; }}},
      {"--json", {false, nothing, [&](const std::string& text) { options.json = text; }}},
  };
  const auto names_what = [](const std::string& word) {
    return word == "layer" || word == "train" || word == "gate" || word == "entropy";
  };
  const std::vector<std::string> all(words + 1, words + count);
  for (size_t i = 0; i < all.size();) {
    const auto& word = all[i++];
    if (word == "--help" || word == "-h") {
      options.help = true;
      return options;
    }
    const auto rule = rules.find(word);
    if (rule == rules.end()) {
      if (!names_what(word))
        throw UsageError("expected layer, train, gate, entropy or an option, got '" + word + "'");
      if (std::find(options.what.begin(), options.what.end(), word) == options.what.end())
        options.what.push_back(word);
      continue;
    }
    const auto is_value = [&] { return i < all.size() && all[i].rfind("--", 0) != 0; };
    if (!is_value()) throw UsageError(word + " needs a value");
    rule->second.begin();
    do {
      rule->second.take(all[i++]);
    } while (rule->second.many && is_value() && !names_what(all[i]));
  }
  if (options.what.empty())
    throw UsageError("name what to time: any of layer, train, gate, entropy");
  // Before an hour of timing, not after it.
  if (!options.json.empty() && !std::ofstream(options.json, std::ios::app))
    throw UsageError("cannot write " + options.json);
  return options;
}

}  // namespace bench
