#include "checks.h"
#include "headwise/model.h"

#include <dirent.h>
#include <ftw.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <torch/torch.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "files.h"

using namespace headwise;

namespace test_model {

int remove_one(const char* entry, const struct stat*, int, struct FTW*) {
  return std::remove(entry);
}

/// A folder of its own for each test, removed at the end (POSIX: see src/folders.h).
class ModelFolder : public testing::Test {
 protected:
  void SetUp() override {
    root = testing::TempDir() + "headwise-model-XXXXXX";
    ASSERT_NE(::mkdtemp(root.data()), nullptr);
    torch::manual_seed(0);
  }
  void TearDown() override { ::nftw(root.c_str(), remove_one, 16, FTW_DEPTH | FTW_PHYS); }

  std::vector<std::string> names() const {
    std::vector<std::string> found;
    DIR* stream = ::opendir(root.c_str());
    while (const dirent* entry = ::readdir(stream)) {
      if (entry->d_name[0] != '.' || std::string(entry->d_name).size() > 2) {
        found.push_back(entry->d_name);
      }
    }
    ::closedir(stream);
    return found;
  }

  std::string folder() const { return root + "/model"; }

  /// Rewrites headwise.json.
  void edit(const std::function<void(nlohmann::json&)>& change) const {
    const std::string path = folder() + "/headwise.json";
    auto document = nlohmann::json::parse(std::ifstream(path));
    change(document);
    std::ofstream(path) << document;
  }

  std::string refusal() const {
    return checks::error_of<c10::ValueError>([&] { load(folder()); });
  }

  std::string root;
};

Model small_model() {
  Model model;
  const auto options = MultiheadAttentionOptions(12, 4).batch_first(true);
  model.layers.emplace_back(
      "a.attention",
      MultiheadAttention(MultiheadAttentionOptions(options).gate(BudgetGateOptions().keep(0.5))));
  model.layers.emplace_back(
      "b.attention",
      MultiheadAttention(
          MultiheadAttentionOptions(options).num_heads(2).head_dim(5).kdim(7).add_bias_kv(true)));
  model.layers.emplace_back("c.attention",
                            MultiheadAttention(MultiheadAttentionOptions(options).gate(
                                FixedGateOptions().heads(std::vector<int64_t>{1, 3}))));
  for (auto& [name, layer] : model.layers) layer->eval();
  model.tensors["embedding"] = torch::randn({5, 12});
  model.tensors["decoder"] = model.tensors["embedding"];
  model.tensors["empty"] = torch::zeros({0, 3}, torch::kLong);
  return model;
}

TEST_F(ModelFolder, KeepsWhatMoved) {
  Model model;
  const auto options = MultiheadAttentionOptions(12, 3).batch_first(true).gate(
      SleepGateOptions().keep(0.34).every(2).asleep_by(0.0));
  torch::nn::ModuleList whole;
  std::vector<GateImpl*> gates;
  for (const char* name : {"first", "second"}) {
    model.layers.emplace_back(name, MultiheadAttention(options));
    whole->push_back(model.layers.back().second);
    gates.push_back(model.layers.back().second->gate.get());
  }
  link_gates(*whole);
  for (int step = 0; step < 7; ++step) {
    for (auto* gate : gates) {
      gate->train();
      const auto weight = gate->forward(torch::randn({2, 4, 12})).weight;
      (weight * torch::rand({3})).sum().backward();
    }
  }
  const auto* before = dynamic_cast<SleepGateImpl*>(gates[1]);
  ASSERT_FALSE(before->moves().empty());
  save(model, folder());
  const Model again = load(folder());
  const auto* after = dynamic_cast<SleepGateImpl*>(again.layer("second")->gate.get());
  ASSERT_EQ(after->moves().size(), before->moves().size());
  for (size_t i = 0; i < before->moves().size(); ++i) {
    const auto was = before->moves()[i], is = after->moves()[i];
    EXPECT_EQ(is.step, was.step);
    EXPECT_EQ(is.head, was.head);
    EXPECT_EQ(is.wakes, was.wakes);
    EXPECT_EQ(is.score, was.score);
  }
  edit([](auto& document) { document["moves"][0]["layer"] = "third"; });
  EXPECT_NE(refusal().find("of layer 'third', which no SleepGate of the model has"),
            std::string::npos)
      << refusal();
}

TEST_F(ModelFolder, RoundTrip) {
  const Model model = small_model();
  // What was changed after building is what is saved.
  dynamic_cast<FixedGateImpl&>(*model.layer("c.attention")->gate).scale[1] = 0.25;
  save(model, folder());
  save(model, folder() + "/");  // replaces
  EXPECT_EQ(names(), std::vector<std::string>{"model"});

  const Model loaded = load(folder());
  ASSERT_EQ(loaded.layers.size(), 3u);
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({2, 6, 12}), key = torch::randn({2, 4, 7});
  const auto value = torch::randn({2, 4, 12});
  for (size_t i = 0; i < 3; ++i) {
    const auto& [name, layer] = model.layers[i];
    EXPECT_EQ(loaded.layers[i].first, name);
    const bool cross = i == 1;
    auto run = [&](MultiheadAttention mha) {
      return std::get<0>(mha->forward(x, cross ? key : x, cross ? value : x, {}, false));
    };
    EXPECT_TRUE(torch::equal(run(loaded.layers[i].second), run(layer))) << name;
    EXPECT_FALSE(loaded.layers[i].second->is_training());
  }
  EXPECT_TRUE(torch::equal(loaded.tensor("embedding"), model.tensor("embedding")));
  EXPECT_TRUE(loaded.tensor("decoder").is_same(loaded.tensor("embedding")));
  EXPECT_EQ(loaded.tensor("empty").sizes(), model.tensor("empty").sizes());
  EXPECT_EQ(loaded.layer("b.attention")->options.num_heads(), 2);
  EXPECT_THROW(loaded.tensor("x"), c10::IndexError);
  EXPECT_THROW(loaded.layer("x"), c10::IndexError);
}

Model decoder_model() {
  Model model;
  const auto options = GroupedQueryAttentionOptions(12, 6).num_key_value_heads(3).bias(true);
  model.grouped_layers.emplace_back(
      "a.attention",
      GroupedQueryAttention(
          GroupedQueryAttentionOptions(options).qk_norm_eps(1e-5).keep_selection(true).gate(
              GroupGateOptions().gate(BudgetGateOptions().budget(0.5)))));
  model.grouped_layers.emplace_back(
      "b.attention", GroupedQueryAttention(GroupedQueryAttentionOptions(options)
                                               .num_heads(4)
                                               .head_dim(2)
                                               .output_bias(false)
                                               .scale(0.25)
                                               .sliding_window(3)
                                               .key_value_heads(std::vector<int64_t>{0, 1, 1, 2})));
  model.grouped_layers.emplace_back(
      "c.attention",
      GroupedQueryAttention(
          GroupedQueryAttentionOptions(options).num_heads(0).num_key_value_heads(0).head_dim(2)));
  model.grouped_layers[1].second->drop_bias("k_proj");
  for (auto& [name, layer] : model.grouped_layers) layer->eval();
  return model;
}

TEST_F(ModelFolder, KeepsDecoders) {
  const Model model = decoder_model();
  save(model, folder());
  const Model loaded = load(folder());
  ASSERT_EQ(loaded.grouped_layers.size(), 3u);
  EXPECT_TRUE(loaded.layers.empty());
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({2, 6, 12});
  for (const auto& [name, layer] : model.grouped_layers) {
    const auto& again = loaded.grouped_layer(name);
    KeyValueCache own, other;
    const auto run = [&](GroupedQueryAttention mha, KeyValueCache* cache) {
      return std::get<0>(mha->forward(x, {.cache = cache}));
    };
    EXPECT_TRUE(torch::equal(run(again, &other), run(layer, &own))) << name;
    EXPECT_EQ(own.k.sizes(), other.k.sizes());
    EXPECT_FALSE(again->is_training());
  }
  EXPECT_FALSE(loaded.grouped_layer("b.attention")->k_proj->bias.defined());
  EXPECT_THROW(loaded.grouped_layer("x"), c10::IndexError);
  EXPECT_THROW(loaded.layer("a.attention"), c10::IndexError);
  loaded.grouped_layer("a.attention")->q_proj->weight.fill_(3.0);
  EXPECT_TRUE((loaded.tensor("a.attention.q_proj.weight") == 3.0).all().item<bool>());
}

TEST_F(ModelFolder, LinksGatesInsideGates) {
  Model model;
  const auto gate = GroupGateOptions().gate(RequestedBudgetGateOptions().budget(0.5));
  for (const char* name : {"first", "second"}) {
    model.grouped_layers.emplace_back(
        name, GroupedQueryAttention(GroupedQueryAttentionOptions(12, 6).gate(gate)));
  }
  save(model, folder());
  const Model loaded = load(folder());
  const torch::NoGradGuard no_grad;
  for (auto [name, layer] : loaded.grouped_layers) {
    EXPECT_EQ(std::get<0>(layer->forward(torch::randn({2, 3, 12}))).size(1), 3) << name;
  }
}

TEST_F(ModelFolder, RefusesDecodersThatItCannotRun) {
  const auto refusal_of = [&](const std::function<void(nlohmann::json&)>& change) {
    save(decoder_model(), folder());
    edit(change);
    return refusal();
  };
  EXPECT_NE(refusal_of([](auto& d) { d["layers"][0]["variant"] = "SelectedCappedAttention"; })
                .find(" is a 'SelectedCappedAttention', which computes more than a "
                      "GroupedQueryAttention: load the model in Python"),
            std::string::npos)
      << refusal();
  EXPECT_NE(refusal_of([](auto& d) {
              d["layers"][0]["class"] = "Other";
            }).find("must be one of MultiheadAttention, GroupedQueryAttention, got 'Other'"),
            std::string::npos)
      << refusal();
  EXPECT_NE(refusal_of([](auto& d) { d["layers"][0]["num_key_value_heads"] = 2; })
                .find("'a.attention.k_proj.weight' has shape [6, 12] in model.safetensors and [4, "
                      "12] in headwise.json"),
            std::string::npos)
      << refusal();
  EXPECT_NE(refusal_of([](auto& d) {
              d["layers"][1]["key_value_heads"] = {0, 0, 0, 0};
            }).find("key_value_heads must name each of 3 key/value heads, got 1 of them"),
            std::string::npos)
      << refusal();
  EXPECT_NE(
      refusal_of([](auto& d) { d["layers"][0].erase("scale"); }).find("lacks the key \"scale\""),
      std::string::npos)
      << refusal();
  for (const char* key : {"embed_dim", "num_heads", "head_dim", "num_key_value_heads"}) {
    EXPECT_NE(refusal_of([&](auto& d) { d["layers"][0][key] = int64_t{1} << 40; }), "no error")
        << key;
  }
}

TEST_F(ModelFolder, TensorsOfLayersAreTheirParameters) {
  save(small_model(), folder());
  const Model loaded = load(folder());
  {
    const torch::NoGradGuard no_grad;
    loaded.layer("a.attention")->in_proj_weight.fill_(3.0);
  }
  EXPECT_TRUE((loaded.tensor("a.attention.in_proj_weight") == 3.0).all().item<bool>());
  save(loaded, folder());
  EXPECT_EQ(load(folder()).layer("a.attention")->in_proj_weight[0][0].item<float>(), 3.0f);
}

TEST_F(ModelFolder, KeepsTheDtype) {
  Model model = small_model();
  for (auto& [name, layer] : model.layers) layer->to(torch::kDouble);
  save(model, folder());
  EXPECT_EQ(load(folder()).layer("a.attention")->in_proj_weight.scalar_type(), torch::kDouble);
}

TEST_F(ModelFolder, RefusesWhatItDidNotWrite) {
  EXPECT_THROW(load(folder()), FileError);
  save(small_model(), folder());
  EXPECT_EQ(refusal(), "no error");
  edit([](auto& d) { d["layers"][0]["num_heads"] = "4"; });
  EXPECT_NE(refusal().find("'num_heads' of layer 0 of '"), std::string::npos) << refusal();
  edit([](auto& d) { d["layers"][0]["num_heads"] = 3; });
  EXPECT_NE(refusal().find("has shape [12, 12] in model.safetensors and [12, 9] in headwise.json"),
            std::string::npos)
      << refusal();
  edit([](auto& d) { d["layers"][0]["name"] = "x"; });
  EXPECT_EQ(refusal(), "model.safetensors lacks 'x.out_proj.weight'");
  edit([](auto& d) { d["surprise"] = 1; });
  EXPECT_NE(refusal().find("has an unknown key \"surprise\""), std::string::npos) << refusal();
  std::remove((folder() + "/model.safetensors").c_str());
  edit([](auto& d) { d.erase("surprise"); });
  EXPECT_THROW(load(folder()), FileError);
}

TEST_F(ModelFolder, KeepsOtherFilesAndSymbolicLinks) {
  save(small_model(), folder());
  std::ofstream(folder() + "/tokenizer.json") << "words";
  ASSERT_EQ(::mkdir((folder() + "/notes").c_str(), 0777), 0);
  std::ofstream(folder() + "/notes/today") << "read me";
  const std::string link = root + "/latest";
  ASSERT_EQ(::symlink("model", link.c_str()), 0);
  save(small_model(), link);
  struct stat status;
  ASSERT_EQ(::lstat(link.c_str(), &status), 0);
  EXPECT_TRUE(S_ISLNK(status.st_mode));
  EXPECT_EQ(read_file(folder() + "/tokenizer.json", 100), "words");
  EXPECT_EQ(read_file(folder() + "/notes/today", 100), "read me");
  EXPECT_EQ(load(link).layers.size(), load(folder()).layers.size());
  EXPECT_EQ(names().size(), 2);
}

TEST_F(ModelFolder, SeveralWritersLeaveOneWholeModel) {
  save(small_model(), folder());
  std::ofstream(folder() + "/tokenizer.json") << "words";
  std::atomic<bool> done{false};
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 15; ++k) {
        try {
          save(small_model(), folder());
        } catch (const std::exception& error) {
          ADD_FAILURE() << error.what();
          ++failures;
        }
      }
    });
  }
  std::thread reader([&] {
    while (!done) EXPECT_NO_THROW(load(folder()));
  });
  for (auto& thread : threads) thread.join();
  done = true;
  reader.join();
  EXPECT_EQ(failures, 0);
  EXPECT_EQ(read_file(folder() + "/tokenizer.json", 100), "words");
  EXPECT_EQ(names(), std::vector<std::string>{"model"});
}

TEST_F(ModelFolder, ComparesSizesBeforeTheyAreAllocated) {
  save(small_model(), folder());
  for (const char* key : {"embed_dim", "num_heads", "head_dim", "kdim", "vdim"}) {
    save(small_model(), folder());
    edit([&](nlohmann::json& document) { document["layers"][0][key] = int64_t{1} << 40; });
    EXPECT_NE(refusal(), "") << key;
  }
}

TEST_F(ModelFolder, SavesNowhereElse) {
  ASSERT_EQ(::mkdir(folder().c_str(), 0777), 0);
  std::ofstream(folder() + "/thesis.txt") << "years of work";
  EXPECT_THROW(save(small_model(), folder()), c10::ValueError);
  EXPECT_TRUE(std::ifstream(folder() + "/thesis.txt").good());
  Model twice = small_model();
  twice.layers.push_back(twice.layers[0]);
  EXPECT_THROW(save(twice, root + "/new"), c10::ValueError);
  EXPECT_EQ(names(), std::vector<std::string>{"model"});
}

}  // namespace test_model
