// SPDX-License-Identifier: Apache-2.0
// bop2nd_runtime._native: include/bop2nd_runtime.h for Python. Arguments are checked in
// bop2nd_runtime/network.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bop2nd_runtime.h"

namespace py = pybind11;

namespace {

struct Failure : std::runtime_error {
  bop2nd_status status;
  explicit Failure(bop2nd_status s) : std::runtime_error(bop2nd_last_error()), status(s) {}
};

void check(bop2nd_status status) {
  if (status != BOP2ND_OK) throw Failure(status);
}

py::dtype dtype_of(bop2nd_dtype dtype) {
  switch (dtype) {
    case BOP2ND_FLOAT32:
      return py::dtype::of<float>();
    case BOP2ND_INT32:
      return py::dtype::of<int32_t>();
    case BOP2ND_INT64:
      return py::dtype::of<int64_t>();
    case BOP2ND_INT8:
      return py::dtype::of<int8_t>();
    case BOP2ND_UINT8:
      return py::dtype::of<uint8_t>();
  }
  throw std::runtime_error("a dtype that this module does not know");
}

struct ContextDeleter {
  void operator()(bop2nd_context* context) const { bop2nd_context_free(context); }
};
using Context = std::unique_ptr<bop2nd_context, ContextDeleter>;

// The inputs of a call, as the C functions want them. Lives as long as the arrays.
struct Inputs {
  std::vector<std::vector<int64_t>> strides;
  std::vector<bop2nd_tensor> tensors;

  Inputs(const bop2nd_network* network, const std::vector<py::array>& arrays)
      : strides(arrays.size()), tensors(arrays.size()) {
    for (size_t i = 0; i < arrays.size(); ++i) {
      const py::array& array = arrays[i];
      bop2nd_tensor_info info;
      check(bop2nd_input_info(network, static_cast<int32_t>(i), &info));
      if (!array.dtype().equal(dtype_of(info.dtype)) || array.ndim() > BOP2ND_MAX_AXES)
        throw py::type_error("input of a wrong type");
      tensors[i].data = const_cast<void*>(array.data());
      tensors[i].dtype = info.dtype;
      tensors[i].n_axes = static_cast<int32_t>(array.ndim());
      for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
        tensors[i].shape[axis] = array.shape(axis);
        strides[i].push_back(array.strides(axis) / array.itemsize());
      }
      tensors[i].strides = strides[i].data();
    }
  }
};

class Network {
 public:
  Network(const std::string& path, py::object bytes, int32_t n_threads, const bop2nd_limits& limits)
      : n_threads_(n_threads), bytes_(std::move(bytes)) {
    bop2nd_network* loaded = nullptr;
    if (bytes_.is_none()) {
      py::gil_scoped_release released;
      check(bop2nd_load_file(path.c_str(), &limits, &loaded));
    } else {
      char* data;
      Py_ssize_t size;
      if (PyBytes_AsStringAndSize(bytes_.ptr(), &data, &size) != 0) throw py::error_already_set();
      py::gil_scoped_release released;
      check(bop2nd_load_memory(data, static_cast<size_t>(size), &limits, &loaded));
    }
    network_.reset(loaded);
    idle_.push_back(new_context());  // a wrong number of threads is an error here
  }

  std::vector<py::tuple> inputs() const { return infos(bop2nd_n_inputs(network_.get()), bop2nd_input_info); }
  std::vector<py::tuple> outputs() const {
    return infos(bop2nd_n_outputs(network_.get()), bop2nd_output_info);
  }

  std::string describe() const {
    std::string text(bop2nd_describe(network_.get(), nullptr, 0), '\0');
    bop2nd_describe(network_.get(), text.data(), text.size());
    text.pop_back();
    return text;
  }

  // Outputs are copied: their memory belongs to the context, which the next call takes.
  std::vector<py::array> run(const std::vector<py::array>& arrays) {
    Inputs inputs(network_.get(), arrays);
    std::vector<bop2nd_tensor> results(static_cast<size_t>(bop2nd_n_outputs(network_.get())));
    Borrowed context(*this);
    {
      py::gil_scoped_release released;
      check(bop2nd_run(context.get(), inputs.tensors.data(), static_cast<int32_t>(inputs.tensors.size()),
                       results.data(), static_cast<int32_t>(results.size())));
    }
    std::vector<py::array> outputs;
    for (const bop2nd_tensor& result : results) {
      std::vector<py::ssize_t> shape(result.shape, result.shape + result.n_axes);
      outputs.emplace_back(dtype_of(result.dtype), shape, result.data);  // without an owner: numpy copies
    }
    return outputs;
  }

  std::vector<py::tuple> profile(const std::vector<py::array>& arrays) {
    Inputs inputs(network_.get(), arrays);
    Borrowed context(*this);
    std::vector<bop2nd_step_profile> steps(256);
    for (bool whole = false; !whole;) {
      int32_t n_steps = 0;
      {
        py::gil_scoped_release released;
        check(bop2nd_profile(context.get(), inputs.tensors.data(),
                             static_cast<int32_t>(inputs.tensors.size()), steps.data(),
                             static_cast<int32_t>(steps.size()), &n_steps));
      }
      whole = static_cast<size_t>(n_steps) <= steps.size();
      steps.resize(static_cast<size_t>(n_steps));
    }
    std::vector<py::tuple> rows;
    for (const bop2nd_step_profile& s : steps)
      rows.push_back(py::make_tuple(s.name, s.kind, s.seconds, s.products));
    return rows;
  }

 private:
  struct NetworkDeleter {
    void operator()(bop2nd_network* network) const { bop2nd_free(network); }
  };

  // A context for one call, so that threads of Python may call at the same time.
  class Borrowed {
   public:
    explicit Borrowed(Network& from) : from_(from) {
      {
        std::lock_guard<std::mutex> lock(from_.mutex_);
        if (!from_.idle_.empty()) context_ = std::move(from_.idle_.back()), from_.idle_.pop_back();
      }
      if (!context_) context_ = from_.new_context();
    }
    ~Borrowed() {
      std::lock_guard<std::mutex> lock(from_.mutex_);
      from_.idle_.push_back(std::move(context_));
    }
    Borrowed(const Borrowed&) = delete;
    Borrowed& operator=(const Borrowed&) = delete;
    bop2nd_context* get() const { return context_.get(); }

   private:
    Network& from_;
    Context context_;
  };

  Context new_context() const {
    bop2nd_context* made = nullptr;
    check(bop2nd_context_new(network_.get(), n_threads_, &made));
    return Context(made);
  }

  template <class Info>
  std::vector<py::tuple> infos(int32_t n, const Info& info_of) const {
    std::vector<py::tuple> all;
    for (int32_t i = 0; i < n; ++i) {
      bop2nd_tensor_info info;
      check(info_of(network_.get(), i, &info));
      py::tuple shape(info.n_axes), free_axes(info.n_axes);
      for (int32_t axis = 0; axis < info.n_axes; ++axis) {
        shape[static_cast<size_t>(axis)] = info.shape[axis];
        free_axes[static_cast<size_t>(axis)] = info.free_axis[axis] != 0;
      }
      all.push_back(py::make_tuple(info.name, dtype_of(info.dtype), shape, free_axes));
    }
    return all;
  }

  int32_t n_threads_;
  py::object bytes_;  // what the network reads, if it is not a file
  std::unique_ptr<bop2nd_network, NetworkDeleter> network_;
  std::mutex mutex_;
  std::vector<Context> idle_;
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  static py::handle file_error = py::exception<Failure>(m, "PackedFileError", PyExc_ValueError).release();
  static py::handle limit_error = py::exception<Failure>(m, "LimitError", PyExc_ValueError).release();
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const Failure& failure) {
      PyObject* type = PyExc_ValueError;  // BOP2ND_ERROR_ARGUMENT
      if (failure.status == BOP2ND_ERROR_IO) type = PyExc_OSError;
      if (failure.status == BOP2ND_ERROR_FILE || failure.status == BOP2ND_ERROR_UNSUPPORTED)
        type = file_error.ptr();
      if (failure.status == BOP2ND_ERROR_LIMIT) type = limit_error.ptr();
      if (failure.status == BOP2ND_ERROR_MEMORY) type = PyExc_MemoryError;
      PyErr_SetString(type, failure.what());
    }
  });
  py::class_<Network>(m, "Network")
      .def(py::init([](const std::string& path, py::object bytes, int32_t n_threads, uint64_t file_bytes,
                       uint64_t run_bytes, uint64_t run_products) {
             return std::make_unique<Network>(path, std::move(bytes), n_threads,
                                              bop2nd_limits{file_bytes, run_bytes, run_products});
           }),
           py::arg("path"), py::arg("bytes"), py::arg("n_threads"), py::arg("file_bytes"),
           py::arg("run_bytes"), py::arg("run_products"))
      .def("inputs", &Network::inputs)
      .def("outputs", &Network::outputs)
      .def("describe", &Network::describe)
      .def("run", &Network::run)
      .def("profile", &Network::profile);
  m.def("version", bop2nd_version);
  m.def("instruction_set", bop2nd_instruction_set);
}
