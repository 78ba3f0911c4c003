// SPDX-License-Identifier: Apache-2.0
// bop2nd-run: a packed network from the command line, for .npy files. Nothing but the C API and the standard
// library; `bop2nd_runtime` for Python has a command of the same name that reads pictures too.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "bop2nd_runtime.h"

namespace {

const char kUsage[] =
    "usage: bop2nd-run MODEL                          what the network is\n"
    "       bop2nd-run MODEL --npy X.npy [-o Y.npy]   run it; uint8 or float32 in [-1, 1], [N, C, H, W].\n"
    "                                                 Several outputs go to Y.0.npy, Y.1.npy, ...\n"
    "       bop2nd-run MODEL --bench                  time per layer on the example's shape\n"
    "       --threads N                               how many threads compute, 1 if not given\n";

void check(bop2nd_status status) {
  if (status != BOP2ND_OK) throw std::runtime_error(bop2nd_last_error());
}

struct Npy {
  std::string type;  // "<f4"
  std::vector<int64_t> shape;
  std::vector<char> bytes;

  int64_t elements() const {
    int64_t n = 1;
    for (int64_t size : shape) {
      if (size < 0 || (size > 0 && n > (int64_t{1} << 40) / size))
        throw std::runtime_error("a shape too large");
      n *= size;
    }
    return n;
  }
};

// What stands behind 'name': in a header that NumPy writes.
std::string field(const std::string& header, const std::string& name) {
  size_t at = header.find("'" + name + "':");
  if (at == std::string::npos) throw std::runtime_error("a .npy header without " + name);
  return header.substr(header.find_first_not_of(' ', at + name.size() + 3));
}

Npy read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::vector<char> all((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  auto byte = [&](size_t i) { return static_cast<size_t>(static_cast<unsigned char>(all.at(i))); };
  if (all.size() < 12 || std::memcmp(all.data(), "\x93NUMPY", 6) != 0)
    throw std::runtime_error(path + " is no .npy file");
  size_t start = byte(6) == 1 ? 10 : 12, length = byte(8) | byte(9) << 8;
  if (byte(6) > 1) length |= byte(10) << 16 | byte(11) << 24;
  if (all.size() < start || all.size() - start < length) throw std::runtime_error(path + " is cut short");
  std::string header(all.data() + start, length), type = field(header, "descr");
  if (field(header, "fortran_order").compare(0, 5, "False") != 0)
    throw std::runtime_error(path + " is in Fortran order");
  Npy array;
  if (type.size() > 4) array.type = type.substr(1, 3);
  std::string shape = field(header, "shape");
  for (const char* at = shape.c_str(); *at != '\0' && *at != ')';) {
    char* end;
    long long size = std::strtoll(at, &end, 10);
    if (end != at) array.shape.push_back(size);
    at = end == at ? at + 1 : end;
  }
  array.bytes.assign(all.begin() + static_cast<std::ptrdiff_t>(start + length), all.end());
  return array;
}

const char* npy_type(bop2nd_dtype dtype) {
  switch (dtype) {
    case BOP2ND_FLOAT32:
      return "<f4";
    case BOP2ND_INT32:
      return "<i4";
    case BOP2ND_INT64:
      return "<i8";
    case BOP2ND_INT8:
      return "|i1";
    case BOP2ND_UINT8:
      return "|u1";
  }
  throw std::runtime_error("a dtype that this program does not know");
}

size_t element_bytes(bop2nd_dtype dtype) { return static_cast<size_t>(npy_type(dtype)[2] - '0'); }

int64_t elements(const bop2nd_tensor& t) {
  int64_t n = 1;
  for (int32_t i = 0; i < t.n_axes; ++i) n *= t.shape[i];
  return n;
}

void write_npy(const std::string& path, const bop2nd_tensor& t) {
  std::string shape;
  for (int32_t i = 0; i < t.n_axes; ++i) shape += std::to_string(t.shape[i]) + ", ";
  std::string header = std::string("{'descr': '") + npy_type(t.dtype) +
                       "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header += std::string(63 - (10 + header.size()) % 64, ' ') + "\n";
  std::ofstream file(path, std::ios::binary);
  file.write("\x93NUMPY\x01\x00", 8);
  file.put(static_cast<char>(header.size() & 255)).put(static_cast<char>(header.size() >> 8));
  file << header;
  file.write(static_cast<const char*>(t.data),
             static_cast<std::streamsize>(static_cast<size_t>(elements(t)) * element_bytes(t.dtype)));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

struct Program {
  bop2nd_network* network = nullptr;
  bop2nd_context* context = nullptr;
  std::vector<std::vector<char>> memory;  // of the inputs
  std::vector<bop2nd_tensor> inputs, outputs;

  Program(const char* model, int32_t n_threads) {
    check(bop2nd_load_file(model, nullptr, &network));
    check(bop2nd_context_new(network, n_threads, &context));
    outputs.resize(static_cast<size_t>(bop2nd_n_outputs(network)));
  }
  ~Program() { bop2nd_context_free(context), bop2nd_free(network); }
  Program(const Program&) = delete;

  bop2nd_tensor_info input(int32_t i) const {
    bop2nd_tensor_info info;
    check(bop2nd_input_info(network, i, &info));
    return info;
  }

  void run() {
    check(bop2nd_run(context, inputs.data(), static_cast<int32_t>(inputs.size()), outputs.data(),
                     static_cast<int32_t>(outputs.size())));
  }

  void add_input(const int64_t* shape, int32_t n_axes, bop2nd_dtype dtype, std::vector<char> bytes) {
    bop2nd_tensor t{};
    t.dtype = dtype, t.n_axes = n_axes;
    std::copy(shape, shape + n_axes, t.shape);
    if (bytes.size() != static_cast<size_t>(elements(t)) * element_bytes(dtype))
      throw std::runtime_error("an array of another size than it says");
    memory.push_back(std::move(bytes));
    t.data = memory.back().data();
    inputs.push_back(t);
  }

  void describe() const {
    std::string text(bop2nd_describe(network, nullptr, 0), '\0');
    bop2nd_describe(network, &text[0], text.size());
    std::printf("%s\n", text.c_str());
  }

  // Class and probability of every row, or the outputs' shapes.
  void print() const {
    for (const bop2nd_tensor& t : outputs) {
      bool classes = t.dtype == BOP2ND_FLOAT32 && t.n_axes == 2 && t.shape[1] > 0;
      for (int64_t row = 0; classes && row < t.shape[0]; ++row) {
        const float* logits = static_cast<const float*>(t.data) + row * t.shape[1];
        const float* best = std::max_element(logits, logits + t.shape[1]);
        double sum = 0;
        for (int64_t i = 0; i < t.shape[1]; ++i) sum += std::exp(static_cast<double>(logits[i] - *best));
        std::printf("%lld: class %lld (%.3f)\n", static_cast<long long>(row),
                    static_cast<long long>(best - logits), 1.0 / sum);
      }
      if (classes) continue;
      std::printf("%s [", npy_type(t.dtype));
      for (int32_t i = 0; i < t.n_axes; ++i)
        std::printf("%s%lld", i ? ", " : "", static_cast<long long>(t.shape[i]));
      std::printf("]\n");
    }
  }

  void predict(const std::string& path, const std::string& output) {
    Npy array = read_npy(path);
    bop2nd_tensor_info info = input(0);
    if (bop2nd_n_inputs(network) != 1) throw std::runtime_error("the network has several inputs");
    if (array.shape.size() > BOP2ND_MAX_AXES) throw std::runtime_error(path + " has too many axes");
    if (array.type == "|u1" && info.dtype == BOP2ND_FLOAT32) {
      int64_t n = array.elements();
      if (array.bytes.size() != static_cast<size_t>(n)) throw std::runtime_error(path + " is cut short");
      std::vector<char> floats(array.bytes.size() * 4);
      for (size_t i = 0; i < array.bytes.size(); ++i) {
        float value = static_cast<float>(static_cast<unsigned char>(array.bytes[i])) / 127.5f - 1.0f;
        std::memcpy(&floats[4 * i], &value, 4);
      }
      array.bytes.swap(floats);
    } else if (array.type != npy_type(info.dtype)) {
      throw std::runtime_error(path + " holds " + array.type + ", the network takes " + npy_type(info.dtype));
    }
    array.elements();
    add_input(array.shape.data(), static_cast<int32_t>(array.shape.size()), info.dtype,
              std::move(array.bytes));
    run();
    if (output.empty()) return print();
    std::string stem = output.substr(0, output.rfind(".npy"));
    for (size_t i = 0; i < outputs.size(); ++i)
      write_npy(outputs.size() == 1 ? output : stem + "." + std::to_string(i) + ".npy", outputs[i]);
  }

  void bench() {
    using Clock = std::chrono::steady_clock;
    for (int32_t i = 0; i < bop2nd_n_inputs(network); ++i) {
      bop2nd_tensor_info info = input(i);
      size_t n = element_bytes(info.dtype);
      for (int32_t axis = 0; axis < info.n_axes; ++axis) n *= static_cast<size_t>(info.shape[axis]);
      add_input(info.shape, info.n_axes, info.dtype, std::vector<char>(n));
    }
    run();
    std::vector<double> times;
    for (auto end = Clock::now() + std::chrono::seconds(1); Clock::now() < end || times.size() < 5;) {
      auto begin = Clock::now();
      run();
      times.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
    }
    std::sort(times.begin(), times.end());
    std::printf("%s: median %.3f ms, best %.3f ms of %zu runs\n", bop2nd_instruction_set(),
                times[times.size() / 2] * 1e3, times[0] * 1e3, times.size());
    std::vector<bop2nd_step_profile> steps(4096);
    int32_t n_steps = 0;
    check(bop2nd_profile(context, inputs.data(), static_cast<int32_t>(inputs.size()), steps.data(),
                         static_cast<int32_t>(steps.size()), &n_steps));
    for (int32_t i = 0; i < n_steps && i < static_cast<int32_t>(steps.size()); ++i) {
      const bop2nd_step_profile& s = steps[static_cast<size_t>(i)];
      std::printf("%-24s %-16s %10.1f us", s.name, s.kind, s.seconds * 1e6);
      if (s.products > 0 && s.seconds > 0) std::printf(" %8.1f GMAC/s", s.products / s.seconds * 1e-9);
      std::printf("\n");
    }
  }
};

int run_program(int n, char** arguments) {
  std::string model, npy, output;
  bool bench = false;
  int32_t n_threads = 1;
  for (int i = 1; i < n; ++i) {
    std::string name = arguments[i];
    bool more = i + 1 < n;
    if (name == "--npy" && more) {
      npy = arguments[++i];
    } else if (name == "-o" && more) {
      output = arguments[++i];
    } else if (name == "--threads" && more) {
      n_threads = std::atoi(arguments[++i]);
    } else if (name == "--bench") {
      bench = true;
    } else if (name == "--help" || name[0] == '-' || !model.empty()) {
      std::fputs(kUsage, name == "--help" ? stdout : stderr);
      return name == "--help" ? 0 : 2;
    } else {
      model = name;
    }
  }
  if (model.empty() || (bench && !npy.empty()) || (npy.empty() && !output.empty())) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  Program program(model.c_str(), n_threads);
  if (bench) {
    program.bench();
  } else if (npy.empty()) {
    program.describe();
  } else {
    program.predict(npy, output);
  }
  return 0;
}

}  // namespace

int main(int n, char** arguments) {
  try {
    return run_program(n, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bop2nd-run: %s\n", error.what());
    return 2;
  }
}
