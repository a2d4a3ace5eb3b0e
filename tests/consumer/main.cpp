// Uses headwise as a stranger would: public headers, the target headwise::headwise, nothing else.
#include <ATen/ATen.h>

#include <iostream>

#include "headwise/selection.h"
#include "headwise/version.h"

int main() {
  const headwise::Selection selection = headwise::select_all(2, 3, at::TensorOptions(at::kFloat));
  if (selection.index.sizes() != at::IntArrayRef({2, 3})) {
    std::cerr << "select_all gave an index of shape " << selection.index.sizes() << '\n';
    return 1;
  }
  std::cout << "headwise " << headwise::version() << ", compiled against torch "
            << headwise::compiled_torch_version() << '\n';
}
