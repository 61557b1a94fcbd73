// Runs compiled artifacts in a C++ program, without Python: tokens in, logits out.
//
//   tyir::Model model("OUT/4die");                     any number of dies; lengths, caches and weights as the manifest says
//   const float* logits = model.feed({8, 5, 17});       of the last of these tokens; the next call continues behind them
//   int32_t best = model.best();                        its most likely successor
//
// Needs headers and libraries of tvm_ffi and libtvm_runtime (build.sh), a C++17 compiler and Linux.  Files are read as docs/deploy.md
// describes them; weights are used where their files are mapped.  What cannot be done is a std::runtime_error.
#pragma once

#include <dlpack/dlpack.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace tyir {

namespace ffi = tvm::ffi;

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

// ------------------------------------------------------------------------------------------------------- files

inline ffi::Any at(const ffi::Any& object, const std::string& key) {
  auto map = object.cast<ffi::json::Object>();
  auto found = map.find(ffi::String(key));
  if (found == map.end()) fail("the manifest has no '" + key + "'");
  return (*found).second;
}
inline std::string text_at(const ffi::Any& object, const std::string& key) {
  return std::string(at(object, key).cast<ffi::String>());
}
inline int64_t number_at(const ffi::Any& object, const std::string& key) { return at(object, key).cast<int64_t>(); }
inline ffi::json::Array list_at(const ffi::Any& object, const std::string& key) {
  return at(object, key).cast<ffi::json::Array>();
}

// A file mapped for reading, as long as the program runs.
inline const char* mapped(const std::string& path, size_t* size) {
  int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info;
  if (file < 0 || fstat(file, &info) != 0) fail("cannot read " + path + ": " + std::strerror(errno));
  *size = static_cast<size_t>(info.st_size);
  void* data = *size ? mmap(nullptr, *size, PROT_READ, MAP_PRIVATE, file, 0) : nullptr;
  close(file);
  if (data == MAP_FAILED) fail("cannot map " + path + ": " + std::strerror(errno));
  return static_cast<const char*>(data);
}

// Adds the tensors of a `.params` file (safetensors: u64 bytes of the JSON header, the header, data) by name.
inline void read_params(const std::string& path, std::map<std::string, const char*>* tensors) {
  size_t size;
  const char* data = mapped(path, &size);
  uint64_t header = 0;
  if (size >= 8) std::memcpy(&header, data, 8);
  if (size < 8 || header > size - 8) fail(path + " is no safetensors file, or is cut short");
  ffi::json::Object names = ffi::json::Parse(ffi::String(data + 8, header)).cast<ffi::json::Object>();
  for (const auto& [name, tensor] : names) {
    std::string key(name.cast<ffi::String>());
    if (key == "__metadata__") continue;
    auto offsets = list_at(tensor, "data_offsets");
    if (static_cast<uint64_t>(offsets[1].cast<int64_t>()) > size - 8 - header) fail(path + " is cut short");
    (*tensors)[key] = data + 8 + header + offsets[0].cast<int64_t>();
  }
}

// A processor without an instruction of the code would end the process without a word.
inline void check_processor(const ffi::Any& manifest) {
  std::ifstream file("/proc/cpuinfo");
  std::set<std::string> here;
  for (std::string line; here.empty() && std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    for (std::string word; words >> word;) here.insert(word);
  }
  if (!file && here.empty()) return;  // the system does not say
  ffi::Any host = at(at(manifest, "build"), "host");
  for (const ffi::Any& feature : list_at(host, "features")) {
    std::string name(feature.cast<ffi::String>());
    if (!here.count(name)) {
      fail("the libraries were compiled for a " + text_at(host, "mcpu") + " processor and need " + name +
           ", which this one does not have: compile again here, or with --mcpu x86-64-v3");
    }
  }
}

// Kernels run on so many of the cores that the process may use, 0 for all of them.
inline void use_threads(int count) {
  cpu_set_t set;
  ffi::Array<ffi::String> cores;
  sched_getaffinity(0, sizeof set, &set);
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) cores.push_back(std::to_string(core));
  }
  int all = static_cast<int>(cores.size());
  if (count < 0 || count > all) fail("this process may use 1 to " + std::to_string(all) + " cores");
  constexpr int kShareAllCores = -3;  // tvm::runtime::threading::ThreadGroup::AffinityMode
  ffi::Function::GetGlobalRequired("runtime.config_threadpool")(kShareAllCores, count ? count : all, cores);
}

// ------------------------------------------------------------------------------------------------------- steps

// A tensor of a step, its memory zeros at first unless it is another's.
class Tensor {
 public:
  Tensor(std::vector<int64_t> shape, DLDataType type, void* data = nullptr) : shape_(std::move(shape)) {
    int64_t elements = 1;
    for (int64_t extent : shape_) elements *= extent;
    if (data == nullptr) {  // from a multiple of 64 on, as workspaces must be
      memory_.resize(static_cast<size_t>(elements * type.bits / 8) / 64 + 2);
      data = memory_.data();
    }
    view_ = {data, {kDLCPU, 0}, static_cast<int32_t>(shape_.size()), type, shape_.data(), nullptr, 0};
  }
  Tensor(const Tensor&) = delete;

  DLTensor* view() { return &view_; }
  template <typename T>
  T* data() const {
    return static_cast<T*>(view_.data);
  }
  int64_t extent(int from_end) const { return shape_[shape_.size() - from_end]; }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<int64_t> shape_;
  std::vector<Line> memory_;
  DLTensor view_;
};

inline DLDataType type_of(const std::string& name) {  // f16, i32, ui8, ..
  size_t digits = name.find_first_of("0123456789");
  std::string kind = name.substr(0, digits);
  uint8_t code = kind == "f" ? kDLFloat : kind == "bf" ? kDLBfloat : kind == "ui" ? kDLUInt : kDLInt;
  return {code, static_cast<uint8_t>(std::stoi(name.substr(digits))), 1};
}

inline std::shared_ptr<Tensor> tensor_of(const ffi::Any& info) {
  std::vector<int64_t> shape;
  for (const ffi::Any& extent : list_at(info, "shape")) shape.push_back(extent.cast<int64_t>());
  return std::make_shared<Tensor>(shape, type_of(text_at(info, "dtype")));
}

using Tensors = std::map<std::string, std::shared_ptr<Tensor>>;

// One die's step of one length.
class Step {
 public:
  // `caches`: the die's, which the steps of all lengths share.
  Step(const std::string& folder, const ffi::Any& program, Tensors* caches)
      : library(ffi::Module::LoadFromFile(folder + "/" + text_at(program, "library"))) {
    auto infos = list_at(program, "inputs");
    std::set<int64_t> written;
    for (const ffi::Any& output : list_at(program, "outputs")) {
      if (at(output, "alias") != nullptr) written.insert(number_at(output, "alias"));
    }
    for (int64_t i = 0; i < static_cast<int64_t>(infos.size()); ++i) {
      std::string name = text_at(infos[i], "name");
      bool cache = written.count(i);
      if (!cache && name != "ids" && name != "pos" && name != "row") {
        fail("these artifacts take '" + name + "', which this program does not know how to give");
      }
      std::shared_ptr<Tensor>& tensor = cache ? (*caches)[name] : inputs[name];
      if (tensor == nullptr) tensor = tensor_of(infos[i]);
      arguments_.emplace_back(tensor->view());
    }
    for (const ffi::Any& output : list_at(program, "outputs")) {
      if (at(output, "alias") != nullptr) continue;
      std::shared_ptr<Tensor>& tensor = outputs[text_at(output, "name")] = tensor_of(output);
      arguments_.emplace_back(tensor->view());
    }
    std::map<std::string, const char*> params;
    read_params(folder + "/" + text_at(program, "params"), &params);
    read_params(folder + "/" + text_at(program, "constants"), &params);
    struct Names {
      int64_t count;
      const char* const all[];
    };
    auto* names = static_cast<const Names*>(function("step_weights")().cast<void*>());
    weights_ = std::make_unique<Tensor>(std::vector<int64_t>{std::max<int64_t>(names->count, 1)}, type_of("i64"));
    for (int64_t i = 0; i < names->count; ++i) {
      auto found = params.find(names->all[i]);
      if (found == params.end()) fail(std::string("the weight ") + names->all[i] + " is in no file of " + folder);
      weights_->data<const char*>()[i] = found->second;
    }
    int64_t bytes = function("step_workspace_bytes")().cast<int64_t>();
    workspace_ = std::make_unique<Tensor>(std::vector<int64_t>{bytes}, type_of("ui8"));
    for (Tensor* own : {weights_.get(), workspace_.get()}) arguments_.emplace_back(own->view());
    arguments_.resize(arguments_.size() + 2, static_cast<void*>(nullptr));
  }

  ffi::Function function(const std::string& name) const {
    auto found = library->GetFunction(name);
    if (!found.has_value()) fail("a library has no function " + name + ": it was compiled by an older tyir");
    return found.value();
  }

  // What the step calls where dies meet.
  void meets(void* exchange, void* context) {
    arguments_[arguments_.size() - 2] = exchange;
    arguments_[arguments_.size() - 1] = context;
  }

  std::vector<ffi::AnyView>& arguments() { return arguments_; }

  ffi::Module library;
  Tensors inputs, outputs;  // but for caches

 private:
  std::vector<ffi::AnyView> arguments_;
  std::unique_ptr<Tensor> weights_, workspace_;
};

// The steps of one length, of all dies.
class Steps {
 public:
  explicit Steps(std::vector<std::unique_ptr<Step>> dies) : dies_(std::move(dies)), run_(dies_[0]->function("step")) {
    if (dies_.size() == 1) return;
    // dies of one process meet in compiled code: backends/host/meeting.py
    std::vector<ffi::Any> sites;
    for (const auto& die : dies_) sites.push_back(die->function("meeting_sites")());
    std::vector<ffi::AnyView> arguments{1, kLooks};
    for (const ffi::Any& site : sites) arguments.emplace_back(site);
    ffi::Any meeting;
    dies_[0]->function("meeting").CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &meeting);
    meeting_ = meeting.cast<void*>();
    void* exchange = dies_[0]->function("meeting_exchange")().cast<void*>();
    for (int64_t i = 0; i < static_cast<int64_t>(dies_.size()); ++i) {
      Step& die = *dies_[i];
      die.meets(exchange, dies_[0]->function("meeting_context")(meeting_, i).cast<void*>());
      void* given = die.arguments().data();
      int64_t count = static_cast<int64_t>(die.arguments().size());
      functions_.push_back(die.function("step"));
      dies_[0]->function("meeting_step")(meeting_, i, functions_.back(), given, count);
    }
    run_ = dies_[0]->function("meeting_run");
  }
  Steps(const Steps&) = delete;
  ~Steps() {
    if (meeting_ != nullptr) dies_[0]->function("meeting_end")(meeting_);
  }

  // `count` of `ids` at `position`, padded with the last of them; `wanted`: whether the outputs are read.
  void run(const int32_t* ids, int64_t count, int32_t position, bool wanted) {
    for (const auto& die : dies_) {
      Tensor& tokens = *die->inputs.at("ids");
      for (int64_t i = 0; i < tokens.extent(1); ++i) tokens.data<int32_t>()[i] = ids[std::min(i, count - 1)];
      die->inputs.at("pos")->data<int32_t>()[0] = position;
      auto row = die->inputs.find("row");
      if (row != die->inputs.end()) row->second->data<int32_t>()[0] = wanted ? static_cast<int32_t>(count - 1) : -1;
    }
    ffi::Any nothing;
    if (meeting_ != nullptr) {
      run_(meeting_, 0);
    } else {
      std::vector<ffi::AnyView>& arguments = dies_[0]->arguments();
      run_.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &nothing);
    }
  }

  // The first die's, of which all have the same.
  const Tensors& outputs() const { return dies_[0]->outputs; }

 private:
  static constexpr int64_t kLooks = 1000;  // before a thread sleeps none of whose dies can go on
  std::vector<std::unique_ptr<Step>> dies_;
  std::vector<ffi::Function> functions_;
  ffi::Function run_;
  void* meeting_ = nullptr;
};

// ------------------------------------------------------------------------------------------------------- model

class Model {
 public:
  // `folder`: OUT/1die or another number of dies, compiled for one sequence (`--batch 1`); `threads`: 0 for all cores.
  explicit Model(const std::string& folder, int threads = 0) {
    size_t size;
    const char* text = mapped(folder + "/manifest.json", &size);
    ffi::Any manifest = ffi::json::Parse(ffi::String(text, size));
    if (text_at(manifest, "format") != "tyir-artifacts") fail(folder + "/manifest.json is not of tyir");
    ffi::Any options = at(manifest, "options");
    if (number_at(options, "batch") != 1) fail("these artifacts step several sequences at once: compile with --batch 1");
    capacity_ = number_at(options, "max_kv");
    vocabulary_ = number_at(at(manifest, "model"), "vocab_size");
    check_processor(manifest);
    use_threads(threads);
    std::map<int64_t, std::map<int64_t, ffi::Any>> programs;
    for (const ffi::Any& p : list_at(manifest, "programs")) programs[number_at(p, "seqlen")][number_at(p, "die")] = p;
    caches_.resize(static_cast<size_t>(number_at(options, "dies")));
    for (const auto& [length, of_dies] : programs) {
      std::vector<std::unique_ptr<Step>> dies;
      for (const auto& [die, program] : of_dies) dies.push_back(std::make_unique<Step>(folder, program, &caches_.at(die)));
      steps_[length] = std::make_unique<Steps>(std::move(dies));
    }
  }

  // The outputs of the last of these tokens, which follow those that were fed before: `logits` points to as many f32 as
  // the vocabulary has, null where the artifacts give the best tokens alone (`--output topk=K`).
  const float* feed(const std::vector<int32_t>& ids) {
    if (ids.empty()) fail("there is no token to feed");
    for (int32_t id : ids) {
      if (id < 0 || id >= vocabulary_) fail("token " + std::to_string(id) + " is none of " + std::to_string(vocabulary_));
    }
    int64_t count = static_cast<int64_t>(ids.size());
    if (position_ + count > capacity_) {
      fail(std::to_string(count) + " tokens do not fit: " + std::to_string(position_) + " of the cache's " +
           std::to_string(capacity_) + " positions are taken");
    }
    for (int64_t done = 0; done < count;) {  // the smallest length that holds what is left, else the largest
      auto step = steps_.lower_bound(count - done);
      if (step == steps_.end()) --step;
      int64_t now = std::min(step->first, count - done);
      last_ = step->second.get();
      last_->run(ids.data() + done, now, static_cast<int32_t>(position_), done + now == count);
      done += now, position_ += now, row_ = now - 1;
    }
    auto logits = last_->outputs().find("logits");
    return logits == last_->outputs().end() ? nullptr : row_of<float>(*logits->second);
  }

  // The most likely token after the last one.
  int32_t best() const {
    if (last_ == nullptr) fail("feed the model first");
    auto ids = last_->outputs().find("top_ids");
    if (ids != last_->outputs().end()) return row_of<int32_t>(*ids->second)[0];
    const Tensor& logits = *last_->outputs().at("logits");
    const float* values = row_of<float>(logits);
    return static_cast<int32_t>(std::max_element(values, values + logits.extent(1)) - values);
  }

  int64_t position() const { return position_; }

  // Forgets all tokens from `position` on.
  void rewind(int64_t position = 0) {
    if (position < 0 || position > position_) fail("only what was fed can be forgotten");
    position_ = position;
  }

 private:
  // Of an output [1, rows, n]: that of the last token, or the only one.
  template <typename T>
  const T* row_of(const Tensor& output) const {
    return output.data<T>() + (output.extent(2) == 1 ? 0 : row_) * output.extent(1);
  }

  int64_t capacity_ = 0, vocabulary_ = 0, position_ = 0, row_ = 0;
  std::vector<Tensors> caches_;  // each die's
  std::map<int64_t, std::unique_ptr<Steps>> steps_;  // by their length
  Steps* last_ = nullptr;
};

}  // namespace tyir
