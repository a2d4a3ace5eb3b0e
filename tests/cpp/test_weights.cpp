#include "checks.h"
#include "headwise/weights.h"

#include <ATen/ATen.h>
#include <dirent.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "files.h"

namespace test_weights {

using headwise::NamedTensors;

class Weights : public ::testing::Test {
 protected:
  Weights() : folder_(::testing::TempDir() + "headwise-XXXXXX") {
    if (::mkdtemp(folder_.data()) == nullptr) throw std::runtime_error("no folder for the test");
  }
  ~Weights() override {
    for (const std::string& name : files()) ::unlink(path(name).c_str());
    ::rmdir(folder_.c_str());
  }

  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  // Not std::filesystem: libtorch.so exports one of its own, which crashes.
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    DIR* folder = ::opendir(folder_.c_str());
    while (const dirent* entry = ::readdir(folder)) {
      if (entry->d_name != std::string(".") && entry->d_name != std::string("..")) {
        names.emplace_back(entry->d_name);
      }
    }
    ::closedir(folder);
    return names;
  }
  /// A file with this header and `data` zero bytes.
  std::string file(const std::string& header, size_t data = 0) const {
    std::ofstream out(path("file"), std::ios::binary | std::ios::trunc);
    const uint64_t length = header.size();
    out.write(reinterpret_cast<const char*>(&length), sizeof length);
    out << header << std::string(data, '\0');
    return path("file");
  }

  std::string folder_;
};

/// What loading `path` says it cannot.
std::string refusal(const std::string& path) {
  return checks::error_of<c10::ValueError>([&] { headwise::load_safetensors(path); });
}

TEST_F(Weights, RoundTripOfEveryDtype) {
  NamedTensors tensors{{"empty", at::empty({0, 3})}, {"scalar", at::scalar_tensor(1.5)}};
  for (const auto type :
       {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kFloat8_e4m3fn, at::kFloat8_e5m2,
        at::kFloat8_e4m3fnuz, at::kFloat8_e5m2fnuz, at::kLong, at::kInt, at::kShort, at::kChar,
        at::kUInt64, at::kUInt32, at::kUInt16, at::kByte, at::kBool, at::kComplexFloat}) {
    tensors[c10::toString(type)] = at::randint(0, 2, {3, 5}).to(type).t();
  }
  headwise::save_safetensors(path("w"), tensors, {{"format", "pt"}});
  const auto read = headwise::load_safetensors(path("w"));
  ASSERT_EQ(read.tensors.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    const auto& other = read.tensors.at(name);
    EXPECT_EQ(other.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_EQ(other.sizes(), tensor.sizes()) << name;
    const auto expected = tensor.contiguous();
    EXPECT_EQ(std::memcmp(other.const_data_ptr(), expected.const_data_ptr(), expected.nbytes()), 0)
        << name;
  }
  EXPECT_EQ(read.metadata, (headwise::Metadata{{"format", "pt"}}));
  EXPECT_EQ(headwise::read_safetensors_metadata(path("w")), read.metadata);
  EXPECT_EQ(files().size(), 1u);
}

TEST_F(Weights, HostileHeadersAreRefused) {
  const std::string f32 = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  EXPECT_EQ(refusal(file(f32, 8)), "no error");
  EXPECT_NE(refusal(file(f32, 7)).find("must end within the 7 bytes of data"), std::string::npos);
  EXPECT_NE(refusal(file(f32, 9)).find("must end with its last tensor"), std::string::npos);
  EXPECT_NE(refusal(file("{\"a\":", 8)).find("is not valid JSON"), std::string::npos);
  EXPECT_NE(refusal(file(std::string(1 << 20, '['))).find("must not be nested deeper than 3"),
            std::string::npos);
  EXPECT_NE(refusal(file("{\"a\":" + std::string(1 << 20, '['))).find("nested deeper than 3"),
            std::string::npos);
  const std::string huge =
      R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})";
  EXPECT_NE(refusal(file(huge)).find("fewer than 2^63 bytes"), std::string::npos);
}

TEST_F(Weights, EveryTruncationIsRefused) {
  headwise::save_safetensors(path("w"), {{"a", at::ones({3})}, {"b", at::ones({2}, at::kHalf)}});
  const std::string whole = headwise::read_file(path("w"), 1 << 20);
  for (size_t length = 0; length < whole.size(); ++length) {
    headwise::write_atomic(path("cut"), whole.substr(0, length));
    EXPECT_NE(refusal(path("cut")), "no error") << length;
  }
}

TEST_F(Weights, AFullDiskLeavesTheOldFileAndNothingElse) {
  headwise::save_safetensors(path("w"), {{"a", at::ones({3})}});
  struct rlimit before;
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);  // write() then fails with EFBIG
  const struct rlimit small{4096, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  EXPECT_THROW(headwise::save_safetensors(path("w"), {{"a", at::ones({10000})}}),
               headwise::FileError);
  EXPECT_THROW(headwise::write_atomic(path("t"), std::string(10000, 'x')), headwise::FileError);
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(files().size(), 1u);
  EXPECT_TRUE(headwise::load_safetensors(path("w")).tensors.at("a").equal(at::ones({3})));
}

TEST_F(Weights, AnAtomicFileThatIsNotCommittedNeverWas) {
  {
    headwise::AtomicFile file(path("a"));
    file.write("half", 4);
    EXPECT_EQ(files().size(), 1u);
    EXPECT_NE(::access(path("a").c_str(), F_OK), 0);
  }
  EXPECT_EQ(files().size(), 0u);
  headwise::write_atomic(path("a"), "whole");
  EXPECT_EQ(headwise::read_file(path("a"), 100), "whole");
  EXPECT_THROW(headwise::read_file(path("a"), 4), c10::ValueError);
  EXPECT_THROW(headwise::read_file(path("b"), 4), headwise::FileError);
  try {
    headwise::write_atomic(path("none/a"), "x");
    FAIL();
  } catch (const headwise::FileError& error) {
    EXPECT_EQ(error.code(), std::errc::no_such_file_or_directory);
    EXPECT_EQ(error.path(), path("none/a"));
  }
}

}  // namespace test_weights
