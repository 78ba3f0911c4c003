// SPDX-License-Identifier: Apache-2.0
// The runtime through its C API: golden files give the stored results on every instruction set, on one thread
// and on several, with any strides; what makes no sense gets an error; forks, threads, unloading.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <thread>

#include "../../include/bop2nd_runtime.h"
#include "cpu/dispatch.h"
#include "golden.h"
#include "runtime/error.h"
#include "runtime/network.h"

namespace {

const std::string kData = BOP2ND_TEST_DATA;

struct Golden {
  const char* name;
  std::vector<int64_t> shape;
  int64_t seed;
  bool exact;
  bool of_bytes;
};
const Golden kGolden[] = {{"words", {2, 5, 6, 7}, 40, true, false},
                          {"residual", {2, 3, 6, 7}, 41, false, false},
                          {"signed", {2, 3, 6, 7}, 68, false, true}};

bop2nd_network* load(const Golden& golden) {
  bop2nd_network* network = nullptr;
  std::string path = kData + "/packed_" + golden.name + ".safetensors";
  CHECK(bop2nd_load_file(path.c_str(), nullptr, &network) == BOP2ND_OK, "%s", bop2nd_last_error());
  return network;
}

bop2nd_tensor input_of(const Golden& golden, std::vector<uint8_t>& memory) {
  bop2nd_tensor input{};
  int64_t n = 1;
  input.n_axes = static_cast<int32_t>(golden.shape.size());
  for (size_t i = 0; i < golden.shape.size(); ++i) input.shape[i] = golden.shape[i], n *= golden.shape[i];
  std::vector<float> values = golden_values(n, golden.seed);
  memory.resize(values.size() * (golden.of_bytes ? 1 : sizeof(float)));
  if (golden.of_bytes) {
    for (size_t i = 0; i < values.size(); ++i) memory[i] = static_cast<uint8_t>(values[i] * 40 + 120);
    input.dtype = BOP2ND_UINT8;
  } else {
    std::memcpy(memory.data(), values.data(), memory.size());
  }
  input.data = memory.data();
  return input;
}

void compare(const Golden& golden, const std::vector<bop2nd_tensor>& outputs) {
  std::vector<GoldenArray> wanted = read_npz(kData + "/packed_" + golden.name + ".npz");
  size_t next = 0;
  for (const bop2nd_tensor& output : outputs) {
    if (output.dtype == BOP2ND_INT64) continue;  // a size: the stored arrays are tensors
    const GoldenArray& array = wanted.at(next++);
    CHECK(array.shape == std::vector<int64_t>(output.shape, output.shape + output.n_axes), "%s", golden.name);
    if (golden.exact || output.dtype != BOP2ND_FLOAT32) {
      CHECK(std::memcmp(output.data, array.bytes.data(), array.bytes.size()) == 0, "%s %zu", golden.name,
            next);
      continue;
    }
    const float* got = static_cast<const float*>(output.data);
    const float* right = reinterpret_cast<const float*>(array.bytes.data());
    for (size_t i = 0; i < array.bytes.size() / 4; ++i)
      CHECK(std::abs(got[i] - right[i]) <= 1e-5f + 1e-5f * std::abs(right[i]), "%s: %g, not %g", golden.name,
            static_cast<double>(got[i]), static_cast<double>(right[i]));
  }
  CHECK(next == wanted.size(), "%s has %zu tensors", golden.name, next);
}

void run(const Golden& golden, bop2nd_context* context, const bop2nd_network* network,
         const bop2nd_tensor& input) {
  std::vector<bop2nd_tensor> outputs(static_cast<size_t>(bop2nd_n_outputs(network)));
  for (int round = 0; round < 2; ++round) {
    bop2nd_status status =
        bop2nd_run(context, &input, 1, outputs.data(), static_cast<int32_t>(outputs.size()));
    CHECK(status == BOP2ND_OK, "%s", bop2nd_last_error());
    compare(golden, outputs);
  }
}

void test_golden(const Golden& golden) {
  std::vector<uint8_t> memory;
  bop2nd_tensor input = input_of(golden, memory);
  for (int isa = 0; isa < bop2nd_isa_count(); ++isa) {
    if (bop2nd_isa_force(isa) != 0) continue;
    for (int32_t n_threads : {1, 3}) {
      bop2nd_network* network = load(golden);
      bop2nd_context* context = nullptr;
      CHECK(bop2nd_context_new(network, n_threads, &context) == BOP2ND_OK, "%s", bop2nd_last_error());
      bop2nd_free(network);  // the context keeps what it needs
      network = load(golden);
      run(golden, context, network, input);
      bop2nd_context_free(context), bop2nd_free(network);
    }
  }
  bop2nd_isa_force(-1);
}

// The same image with its channels nearest.
void test_strides(const Golden& golden) {
  std::vector<uint8_t> memory;
  bop2nd_tensor input = input_of(golden, memory);
  std::vector<uint8_t> moved(memory.size());
  size_t size = golden.of_bytes ? 1 : sizeof(float);
  int64_t c = input.shape[1], h = input.shape[2], w = input.shape[3];
  for (int64_t i = 0; i < static_cast<int64_t>(memory.size() / size); ++i) {
    int64_t x = i % w, y = i / w % h, channel = i / w / h % c, n = i / w / h / c;
    std::memcpy(&moved[static_cast<size_t>(((n * h + y) * w + x) * c + channel) * size],
                &memory[static_cast<size_t>(i) * size], size);
  }
  const int64_t strides[] = {c * h * w, 1, w * c, c};
  input.strides = strides, input.data = moved.data();
  bop2nd_network* network = load(golden);
  bop2nd_context* context = nullptr;
  CHECK(bop2nd_context_new(network, 1, &context) == BOP2ND_OK, "%s", bop2nd_last_error());
  run(golden, context, network, input);
  bop2nd_context_free(context), bop2nd_free(network);
}

void test_infos() {
  bop2nd_network* network = load(kGolden[1]);
  bop2nd_tensor_info info;
  CHECK(bop2nd_n_inputs(network) == 1 && bop2nd_input_info(network, 0, &info) == BOP2ND_OK, "input");
  CHECK(std::string(info.name) == "x" && info.n_axes == 4 && info.free_axis[0] == 1 && info.free_axis[1] == 0,
        "input");
  const char* names[] = {"joined", "pair.0", "pair.1.0", "again", "n"};
  CHECK(bop2nd_n_outputs(network) == 5, "%d outputs", bop2nd_n_outputs(network));
  for (int i = 0; i < 5; ++i) {
    CHECK(bop2nd_output_info(network, i, &info) == BOP2ND_OK && std::string(info.name) == names[i], "%s",
          info.name);
  }
  CHECK(info.dtype == BOP2ND_INT64 && info.n_axes == 0, "a size");
  CHECK(bop2nd_output_info(network, 5, &info) == BOP2ND_ERROR_ARGUMENT, "a sixth output");
  size_t n = bop2nd_describe(network, nullptr, 0);
  std::vector<char> text(n);
  CHECK(bop2nd_describe(network, text.data(), n) == n && std::strlen(text.data()) == n - 1, "describe");
  CHECK(std::strstr(text.data(), "packed_conv2d [8, 4, 3, 3]"), "%s", text.data());
  bop2nd_free(network);
}

void test_errors() {
  bop2nd_network* network = nullptr;
  CHECK(bop2nd_load_file("/nonexistent/file", nullptr, &network) == BOP2ND_ERROR_IO && !network,
        "a missing file");
  CHECK(std::strstr(bop2nd_last_error(), "/nonexistent/file"), "%s", bop2nd_last_error());
  CHECK(bop2nd_load_file(kData.c_str(), nullptr, &network) == BOP2ND_ERROR_IO, "a folder");
  std::string torch = kData + "/packed_torch.safetensors", words = kData + "/packed_words.safetensors";
  CHECK(bop2nd_load_file(torch.c_str(), nullptr, &network) == BOP2ND_ERROR_UNSUPPORTED, "profile torch");
  bop2nd_limits small{100, 0, 0};
  CHECK(bop2nd_load_file(words.c_str(), &small, &network) == BOP2ND_ERROR_LIMIT, "a limit of the file");
  small = {0, 1000, 0};
  CHECK(bop2nd_load_file(words.c_str(), &small, &network) == BOP2ND_ERROR_LIMIT, "a limit of the run");
  small = {0, 0, 1000};
  CHECK(bop2nd_load_file(words.c_str(), &small, &network) == BOP2ND_ERROR_LIMIT, "a limit of the work");
  std::vector<uint8_t> bytes = bytes_of(words);
  for (size_t n : {size_t{0}, size_t{7}, size_t{100}, bytes.size() - 1})
    CHECK(bop2nd_load_memory(bytes.data(), n, nullptr, &network) == BOP2ND_ERROR_FILE, "%zu bytes", n);
  bytes.back() ^= 1;
  CHECK(bop2nd_load_memory(bytes.data(), bytes.size(), nullptr, &network) == BOP2ND_ERROR_FILE,
        "an altered file");
  CHECK(std::strstr(bop2nd_last_error(), "checksum"), "%s", bop2nd_last_error());
  CHECK(!network, "a network of an error");

  network = load(kGolden[0]);
  bop2nd_context* context = nullptr;
  CHECK(bop2nd_context_new(network, 0, &context) == BOP2ND_ERROR_ARGUMENT, "no threads");
  CHECK(bop2nd_context_new(network, 1, &context) == BOP2ND_OK, "%s", bop2nd_last_error());
  std::vector<uint8_t> memory;
  bop2nd_tensor input = input_of(kGolden[0], memory), outputs[8];
  CHECK(bop2nd_run(context, &input, 1, outputs, 7) == BOP2ND_ERROR_ARGUMENT, "7 of 8 outputs");
  CHECK(bop2nd_run(context, &input, 0, outputs, 8) == BOP2ND_ERROR_ARGUMENT, "no inputs");
  input.shape[1] = 4;
  CHECK(bop2nd_run(context, &input, 1, outputs, 8) == BOP2ND_ERROR_ARGUMENT, "4 of 5 channels");
  input.shape[1] = 5, input.shape[0] = -1;
  CHECK(bop2nd_run(context, &input, 1, outputs, 8) == BOP2ND_ERROR_ARGUMENT, "a negative batch");
  input.shape[0] = int64_t{1} << 40;
  CHECK(bop2nd_run(context, &input, 1, outputs, 8) != BOP2ND_OK, "a batch of 2^40");
  input = input_of(kGolden[0], memory), input.dtype = BOP2ND_INT32;
  CHECK(bop2nd_run(context, &input, 1, outputs, 8) == BOP2ND_ERROR_ARGUMENT, "words for real numbers");
  input.dtype = BOP2ND_FLOAT32, input.data = nullptr;
  CHECK(bop2nd_run(context, &input, 1, outputs, 8) == BOP2ND_ERROR_ARGUMENT, "no data");
  input = input_of(kGolden[0], memory);
  std::string said = bop2nd_last_error();
  CHECK(said.find("has no data") != std::string::npos, "%s", said.c_str());
  run(kGolden[0], context, network, input);  // errors leave the context as it was
  CHECK(bop2nd_last_error() == said, "a success changes what the last failure said: %s", bop2nd_last_error());
  bop2nd_context_free(context), bop2nd_free(network);
}

// Outputs in memory of the caller: every byte of it is written, and none beside it.
void test_outputs_elsewhere() {
  namespace runtime = bop2nd::runtime;
  auto network = runtime::Network::from_file((kData + "/packed_words.safetensors").c_str(), {});
  runtime::Context context(network, 2);
  std::vector<float> memory = golden_values(2 * 5 * 6 * 7, 40);
  runtime::Array input{runtime::Type::kF32, {2, 5, 6, 7}, {}, memory.data()};
  std::vector<runtime::Array> plain = context.run({input});
  std::vector<std::vector<uint8_t>> wanted, got;
  runtime::Sizes strides;
  for (const runtime::Array& output : plain) {
    const uint8_t* data = static_cast<const uint8_t*>(output.data);
    wanted.emplace_back(data, data + 4 * runtime::product(output.shape));
    for (size_t axis = 0; axis < output.shape.size(); ++axis) {
      runtime::Sizes behind(output.shape.begin() + static_cast<std::ptrdiff_t>(axis) + 1, output.shape.end());
      strides.push_back(runtime::product(behind));
    }
  }
  constexpr size_t kBeside = 64;
  auto allocate = [&](const std::vector<runtime::Array>& outputs, void** places) {
    got.clear();
    for (const runtime::Array& output : outputs) {
      got.emplace_back(4 * static_cast<size_t>(runtime::product(output.shape)) + 2 * kBeside, uint8_t{0xA5});
      *places++ = got.back().data() + kBeside;
    }
  };
  for (int round = 0; round < 2; ++round) {
    context.run_into({input}, strides, allocate);
    for (size_t i = 0; i < wanted.size(); ++i) {
      std::vector<uint8_t> whole(kBeside, 0xA5);
      whole.insert(whole.end(), wanted[i].begin(), wanted[i].end()), whole.insert(whole.end(), kBeside, 0xA5);
      CHECK(got[i] == whole, "output %zu", i);
    }
  }
  auto refused = [&](const runtime::Sizes& wrong) {
    try {
      context.run_into({input}, wrong, allocate);
    } catch (const runtime::Error& error) {
      return error.status == runtime::Status::kArgument;
    }
    return false;
  };
  runtime::Sizes gaps = strides;
  gaps.back() = 2;
  CHECK(refused(gaps) && refused({}), "strides that do not fit");
  strides.push_back(1);
  CHECK(refused(strides), "a stride too many");
}

void test_threads() {
  bop2nd_network* network = load(kGolden[1]);
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([network, i] {
      std::vector<uint8_t> memory;
      bop2nd_tensor input = input_of(kGolden[1], memory);
      bop2nd_context* context = nullptr;
      CHECK(bop2nd_context_new(network, 1 + i % 2, &context) == BOP2ND_OK, "%s", bop2nd_last_error());
      for (int round = 0; round < 5; ++round) run(kGolden[1], context, network, input);
      bop2nd_context_free(context);
    });
  }
  for (std::thread& thread : threads) thread.join();
  bop2nd_free(network);
}

void test_fork() {
  bop2nd_network* network = load(kGolden[1]);
  bop2nd_context* context = nullptr;
  CHECK(bop2nd_context_new(network, 3, &context) == BOP2ND_OK, "%s", bop2nd_last_error());
  std::vector<uint8_t> memory;
  bop2nd_tensor input = input_of(kGolden[1], memory);
  run(kGolden[1], context, network, input);
  std::fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    run(kGolden[1], context, network, input);
    bop2nd_context_free(context);
    _exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  CHECK(status == 0, "the child ended with %d", status);
  run(kGolden[1], context, network, input);
  bop2nd_context_free(context), bop2nd_free(network);
}

}  // namespace

int main() {
  for (const Golden& golden : kGolden) test_golden(golden), test_strides(golden);
  test_infos();
  test_errors();
  test_outputs_elsewhere();
  test_threads();
#if !defined(__SANITIZE_THREAD__)
  test_fork();
#endif
  std::printf("runtime: good\n");
  return 0;
}
