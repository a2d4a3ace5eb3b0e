// Runs a package of AOTInductor that Python wrote (docs/export.md): package MODEL.pt2
//
// A pruned model's package needs LibTorch alone. That of a gated model calls headwise's operators:
// they are there if the program is linked with headwise, which registers them when it is loaded.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: package MODEL.pt2\n";
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const auto ids = torch::arange(14).reshape({2, 7});
  const auto outputs = model.run({ids, torch::ones_like(ids)});
  const auto logits = outputs[0].flatten().to(torch::kDouble);
  std::cout.precision(9);
  for (int64_t i = 0; i < logits.numel(); ++i) std::cout << logits[i].item<double>() << "\n";
}
