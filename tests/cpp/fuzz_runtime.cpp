// SPDX-License-Identifier: Apache-2.0
// Mutated packed files, with their checksums repaired, through the loader and a run: `fuzz_runtime ROUNDS
// [SEED]`. Nothing may crash, compute for a second, or take more than the limits: for the sanitizers to
// judge.
#include <algorithm>
#include <ctime>
#include <new>

#include "../../include/bop2nd_runtime.h"
#include "golden.h"
#include "runtime/json.h"
#include "runtime/sha256.h"

namespace {

using bop2nd::runtime::Json;

struct Random {
  uint64_t state;
  uint64_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * 2685821657736338717ull;
  }
  size_t below(size_t n) { return static_cast<size_t>((next() >> 11) % std::max<size_t>(1, n)); }
};

struct Part {
  std::string name, dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

struct File {
  std::string profile = "bits", graph;
  std::vector<Part> parts;

  explicit File(const std::vector<uint8_t>& bytes) {
    size_t n = bytes[0] | bytes[1] << 8 | bytes[2] << 16;
    std::string text(bytes.begin() + 8, bytes.begin() + 8 + static_cast<std::ptrdiff_t>(n));
    Json header = bop2nd::runtime::parse_json(text);
    graph = header.at("__metadata__", "header").at("graph", "metadata").text;
    for (size_t i = 0; i < header.keys.size(); ++i) {
      if (header.keys[i] == "__metadata__") continue;
      const Json& entry = header.items[i];
      Part part{header.keys[i], entry.at("dtype", "entry").text, {}, ""};
      for (const Json& size : entry.at("shape", "entry").items) part.shape.push_back(size.integer);
      const Json& at = entry.at("data_offsets", "entry");
      const char* body = reinterpret_cast<const char*>(bytes.data()) + 8 + n;
      part.bytes.assign(body + at.items[0].integer, body + at.items[1].integer);
      parts.push_back(part);
    }
  }

  // As a file whose checksum is right.
  std::string written() const {
    bop2nd::runtime::Sha256 hash;
    for (const std::string& text : {std::string("2"), profile, graph}) hash.add(text), hash.add("\0", 1);
    std::vector<const Part*> sorted;
    for (const Part& part : parts) sorted.push_back(&part);
    std::sort(sorted.begin(), sorted.end(), [](const Part* a, const Part* b) { return a->name < b->name; });
    for (const Part* part : sorted) {
      hash.add(part->name), hash.add("\0", 1), hash.add(part->dtype), hash.add("\0", 1);
      hash.add_uint64(part->shape.size());
      for (int64_t size : part->shape) hash.add_uint64(static_cast<uint64_t>(size));
      hash.add(part->bytes);
    }
    std::string header = "{\"__metadata__\":{\"format\":\"bop2nd_fast.packed_model\",\"graph\":\"" +
                         escaped(graph) + "\",\"profile\":\"" + profile + "\",\"sha256\":\"" +
                         hash.hexadecimal() + "\",\"version\":\"2\"}";
    std::string body;
    for (const Part& part : parts) {
      std::string shape;
      for (int64_t size : part.shape) shape += (shape.empty() ? "" : ",") + std::to_string(size);
      header += ",\"" + escaped(part.name) + "\":{\"dtype\":\"" + part.dtype + "\",\"shape\":[" + shape +
                "],\"data_offsets\":[" + std::to_string(body.size()) + "," +
                std::to_string(body.size() + part.bytes.size()) + "]}";
      body += part.bytes;
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    std::string file(8, '\0');
    for (int i = 0; i < 8; ++i) file[static_cast<size_t>(i)] = static_cast<char>(header.size() >> (8 * i));
    return file + header + body;
  }

  static std::string escaped(const std::string& text) {
    std::string to;
    for (char c : text) {
      if (c == '"' || c == '\\') to.push_back('\\');
      to.push_back(c);
    }
    return to;
  }
};

const char* const kNumbers[] = {"0",
                                "1",
                                "-1",
                                "2",
                                "3",
                                "7",
                                "31",
                                "32",
                                "33",
                                "64",
                                "255",
                                "65536",
                                "16777216",
                                "2147483647",
                                "2147483648",
                                "-9223372036854775808",
                                "9223372036854775807",
                                "0.5",
                                "1e308",
                                "null",
                                "true",
                                "false",
                                "[]",
                                "\"x\""};

void mutate_graph(std::string& graph, Random& random) {
  if (graph.empty()) return;
  auto find_from = [&](const char* what) {
    size_t at = graph.find_first_of(what, random.below(graph.size()));
    return at == std::string::npos ? graph.find_first_of(what) : at;
  };
  switch (random.below(7)) {
    case 0:
    case 1:
    case 2: {  // another number
      size_t at = find_from("0123456789");
      if (at == std::string::npos) return;
      size_t end = graph.find_first_not_of("0123456789.eE-", at);
      graph.replace(at, end - at, kNumbers[random.below(sizeof kNumbers / sizeof *kNumbers)]);
      return;
    }
    case 3: {  // one text becomes another one of the graph
      size_t a = find_from("\""), b = find_from("\"");
      if (a == std::string::npos || b == std::string::npos) return;
      size_t a_end = graph.find('"', a + 1), b_end = graph.find('"', b + 1);
      if (a_end == std::string::npos || b_end == std::string::npos) return;
      graph.replace(a, a_end - a, graph.substr(b, b_end - b));
      return;
    }
    case 4: {  // a part goes
      size_t a = find_from(",{["), b = find_from(",}]");
      if (a == std::string::npos || b == std::string::npos || b <= a || b - a > 400) return;
      graph.erase(a, b - a);
      return;
    }
    case 5: {  // a part comes twice
      size_t a = find_from(","), b = graph.find(',', std::min(graph.size(), a + 1 + random.below(200)));
      if (a == std::string::npos || b == std::string::npos) return;
      graph.insert(b, graph.substr(a, b - a));
      return;
    }
    default:
      graph[random.below(graph.size())] = static_cast<char>(32 + random.below(95));
  }
}

void mutate(File& file, Random& random) {
  for (size_t n = 1 + random.below(3); n > 0; --n) {
    size_t pick = random.below(10);
    if (pick < 7 || file.parts.empty()) {
      mutate_graph(file.graph, random);
      continue;
    }
    Part& part = file.parts[random.below(file.parts.size())];
    static const char* const kTypes[] = {"F64", "F32", "F16", "BF16", "I64",
                                         "I32", "I16", "I8",  "U8",   "BOOL"};
    if (pick == 7 && !part.bytes.empty()) {
      part.bytes[random.below(part.bytes.size())] = static_cast<char>(random.next());
    } else if (pick == 8 && !part.shape.empty()) {
      int64_t& size = part.shape[random.below(part.shape.size())];
      size = static_cast<int64_t>(random.below(2) ? random.below(70) : uint64_t{1} << random.below(48));
      int64_t bytes = part.dtype == "I32" || part.dtype == "F32" ? 4 : 1;
      bool fits = true;
      for (int64_t s : part.shape)
        fits = fits && !__builtin_mul_overflow(bytes, s, &bytes) && bytes < 1 << 20;
      if (fits) part.bytes.resize(static_cast<size_t>(bytes), '\1');
    } else {
      part.dtype = kTypes[random.below(10)];
    }
  }
}

// 1 if it ran.
int load_and_run(const std::string& bytes, Random& random) {
  std::vector<uint64_t> aligned(bytes.size() / 8 + 1);  // a file of 0 bytes has an address too
  std::memcpy(aligned.data(), bytes.data(), bytes.size());
  bop2nd_limits limits{1 << 22, 1 << 24, 1 << 26};
  bop2nd_network* network = nullptr;
  if (bop2nd_load_memory(aligned.data(), bytes.size(), &limits, &network) != BOP2ND_OK) {
    CHECK(!network && bop2nd_last_error()[0], "an error without a text");
    return 0;
  }
  bop2nd_context* context = nullptr;
  CHECK(bop2nd_context_new(network, 1, &context) == BOP2ND_OK, "%s", bop2nd_last_error());
  std::vector<bop2nd_tensor> inputs(static_cast<size_t>(bop2nd_n_inputs(network)));
  std::vector<std::vector<float>> memory;
  bool fits = true;
  for (size_t i = 0; i < inputs.size(); ++i) {
    bop2nd_tensor_info info;
    CHECK(bop2nd_input_info(network, static_cast<int32_t>(i), &info) == BOP2ND_OK, "an input");
    inputs[i] = {nullptr, info.dtype, info.n_axes, {}, nullptr};
    int64_t n = 1;
    for (int axis = 0; axis < info.n_axes; ++axis) {
      inputs[i].shape[axis] = info.free_axis[axis] && random.below(8) == 0
                                  ? static_cast<int64_t>(random.below(12))
                                  : info.shape[axis];
      fits = fits && !__builtin_mul_overflow(n, inputs[i].shape[axis], &n) && n < 1 << 18;
    }
    if (!fits) break;
    memory.push_back(golden_values(n, static_cast<int64_t>(random.below(100))));
    if (n > 0 && random.below(4) == 0) memory.back()[0] = __builtin_nanf("");
    inputs[i].data = memory.back().data();
  }
  std::vector<bop2nd_tensor> outputs(static_cast<size_t>(bop2nd_n_outputs(network)));
  int ran = 0;
  if (fits)
    ran = bop2nd_run(context, inputs.data(), static_cast<int32_t>(inputs.size()), outputs.data(),
                     static_cast<int32_t>(outputs.size())) == BOP2ND_OK;
  // Every byte of a result is there to be read. Volatile: else the compiler leaves the loop out.
  for (size_t i = 0; ran && i < outputs.size(); ++i) {
    bop2nd_dtype dtype = outputs[i].dtype;
    int64_t n = dtype == BOP2ND_INT64 ? 8 : dtype == BOP2ND_INT8 || dtype == BOP2ND_UINT8 ? 1 : 4;
    for (int axis = 0; axis < outputs[i].n_axes; ++axis) n *= outputs[i].shape[axis];
    for (int64_t k = 0; k < n; ++k) (void)static_cast<const volatile uint8_t*>(outputs[i].data)[k];
  }
  bop2nd_context_free(context), bop2nd_free(network);
  return ran;
}

// Of this process: on a busy machine it may wait for much longer.
double processor_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

}  // namespace

int main(int argc, char** argv) {
  int64_t n_rounds = argc > 1 ? std::atoll(argv[1]) : 2000;
  Random random{argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 88172645463325252ull};
  std::string data = BOP2ND_TEST_DATA;
  const File seeds[] = {File(bytes_of(data + "/packed_words.safetensors")),
                        File(bytes_of(data + "/packed_residual.safetensors")),
                        File(bytes_of(data + "/packed_signed.safetensors"))};
  for (const File& seed : seeds) CHECK(File(seed).written().size() > 1000, "an empty seed");
  int64_t n_ran = 0;
  double longest = 0;
  for (int64_t round = 0; round < n_rounds; ++round) {
    Random before = random;
    File file = seeds[random.below(3)];
    mutate(file, random);
    std::string bytes = file.written();
    if (random.below(20) == 0) bytes[random.below(bytes.size())] = static_cast<char>(random.next());
    if (random.below(50) == 0) bytes.resize(random.below(bytes.size()));
    double start = processor_seconds();
    n_ran += load_and_run(bytes, random);
    double took = processor_seconds() - start;
    longest = std::max(longest, took);
    CHECK(took < BOP2ND_FUZZ_SECONDS, "round %lld (seed %llu) took %.1f s", static_cast<long long>(round),
          static_cast<unsigned long long>(before.state), took);
  }
  CHECK(n_ran > n_rounds / 100, "only %lld of %lld files ran", static_cast<long long>(n_ran),
        static_cast<long long>(n_rounds));
  std::printf("%lld mutated files, %lld of them ran; the longest took %.3f s\n",
              static_cast<long long>(n_rounds), static_cast<long long>(n_ran), longest);
  return 0;
}
