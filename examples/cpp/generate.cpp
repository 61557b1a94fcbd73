// Greedy decoding with the artifacts of one die, without Python: loads llm_die0.so and the weights, and follows the list of calls that
// list_calls.py has written.
//
//   generate OUT/1die step.txt COUNT ID ID ..      prints COUNT tokens after those ids
//
// Every kernel takes pointers to DLTensor, operands first, then results, all of them contiguous and in host memory; it returns nothing.
#include <dlpack/dlpack.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

// A file mapped for reading: weights are used where they lie.
static char* map_file(const std::string& path) {
  int descriptor = open(path.c_str(), O_RDONLY);
  struct stat info;
  if (descriptor < 0 || fstat(descriptor, &info) != 0) throw std::runtime_error("cannot read " + path);
  void* data = mmap(nullptr, info.st_size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  close(descriptor);
  if (data == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  return static_cast<char*>(data);
}

struct Tensor {
  std::vector<int64_t> shape;
  std::vector<uint64_t> memory;  // of inputs, caches and intermediate results; zeros at first
  DLTensor view{};
};

struct Call {
  ffi::Function kernel;
  std::vector<ffi::AnyView> arguments;  // a DLTensor* each
};

// One step of the model: what list_calls.py wrote, with memory for everything.
class Step {
 public:
  Step(const std::string& folder, const std::string& list)
      : library_(ffi::Module::LoadFromFile(folder + "/batch_1/seqlen_1/llm_die0.so")) {
    std::ifstream file(list);
    if (!file) throw std::runtime_error("cannot read " + list);
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      std::string what;
      words >> what;
      if (what == "tensor") add_tensor(folder, words);
      if (what == "call") add_call(words);
      if (what == "output") words >> output_;
    }
  }

  // The most likely token after `token` at position `position`.
  int32_t operator()(int32_t token, int32_t position) {
    *static_cast<int32_t*>(inputs_.at("ids")->data) = token;
    *static_cast<int32_t*>(inputs_.at("pos")->data) = position;
    for (const Call& call : calls_) {
      ffi::Any nothing;
      call.kernel.CallPacked(call.arguments.data(), static_cast<int32_t>(call.arguments.size()), &nothing);
    }
    const DLTensor& logits = tensors_.at(output_)->view;
    const float* values = static_cast<const float*>(logits.data);
    return static_cast<int32_t>(std::max_element(values, values + logits.shape[logits.ndim - 1]) - values);
  }

 private:
  void add_tensor(const std::string& folder, std::istringstream& words) {
    int number, code, bits;
    words >> number >> code >> bits;
    auto tensor = std::make_unique<Tensor>();
    int64_t elements = 1;
    for (std::string dim; words >> dim && dim != ";";) {
      tensor->shape.push_back(std::stoll(dim));
      elements *= tensor->shape.back();
    }
    std::string where, name;
    words >> where;
    tensor->view.device = {kDLCPU, 0};
    tensor->view.ndim = static_cast<int32_t>(tensor->shape.size());
    tensor->view.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
    tensor->view.shape = tensor->shape.data();
    if (where == "weight") {
      uint64_t offset;
      words >> name >> offset;
      if (!files_.count(name)) files_[name] = map_file(folder + "/" + name);
      tensor->view.data = files_[name] + offset;
    } else if (where == "same") {  // another shape of what is there
      int other;
      words >> other;
      tensor->view.data = tensors_.at(other)->view.data;
    } else {
      tensor->memory.resize((elements * bits / 8 + 7) / 8);
      tensor->view.data = tensor->memory.data();
      if (where == "input") {
        words >> name;
        inputs_[name] = &tensor->view;
      }
    }
    tensors_[number] = std::move(tensor);
  }

  void add_call(std::istringstream& words) {
    std::string name;
    words >> name;
    ffi::Optional<ffi::Function> kernel = library_->GetFunction(name);
    if (!kernel.has_value()) throw std::runtime_error("the library has no kernel " + name);
    Call call{kernel.value(), {}};
    for (int number; words >> number;) call.arguments.emplace_back(&tensors_.at(number)->view);
    calls_.push_back(std::move(call));
  }

  ffi::Module library_;
  std::map<std::string, char*> files_;
  std::map<int, std::unique_ptr<Tensor>> tensors_;
  std::map<std::string, DLTensor*> inputs_;
  std::vector<Call> calls_;
  int output_ = -1;
};

int main(int count, char** words) {
  if (count < 5) {
    std::cerr << "usage: generate OUT/1die step.txt COUNT ID ..\n";
    return 1;
  }
  try {
    Step step(words[1], words[2]);
    int32_t position = 0, next = 0;
    for (int i = 4; i < count; ++i) next = step(std::atoi(words[i]), position++);
    for (int made = 0; made < std::atoi(words[3]); ++made) {
      std::cout << next << (made + 1 < std::atoi(words[3]) ? " " : "\n");
      next = step(next, position++);
    }
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
