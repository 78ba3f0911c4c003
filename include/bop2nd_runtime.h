/* SPDX-License-Identifier: Apache-2.0
 *
 * Runs packed networks (docs/packed_file.md, profile `bits`) where torch is not. C99 and C++.
 *
 *     bop2nd_network* network;
 *     bop2nd_context* context;
 *     bop2nd_load_file("model.safetensors", NULL, &network);
 *     bop2nd_context_new(network, 1, &context);
 *     bop2nd_run(context, inputs, n_inputs, outputs, n_outputs);
 *
 * A network does not change after it was loaded: any number of threads may use it, each with a context of its
 * own. A context belongs to one call at a time. Functions return a status; what was wrong is said by
 * bop2nd_last_error(). Nothing is written where a call fails, and no file, however made, makes one crash.
 */
#ifndef BOP2ND_RUNTIME_H
#define BOP2ND_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define BOP2ND_API __attribute__((visibility("default")))
#else
#define BOP2ND_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define BOP2ND_MAX_AXES 16

typedef struct bop2nd_network bop2nd_network;
typedef struct bop2nd_context bop2nd_context;

typedef enum bop2nd_status {
  BOP2ND_OK = 0,
  BOP2ND_ERROR_IO = 1,          /* the file cannot be read */
  BOP2ND_ERROR_FILE = 2,        /* no packed network, a damaged one, or one that contradicts itself */
  BOP2ND_ERROR_UNSUPPORTED = 3, /* of a newer format version, or of profile `torch` */
  BOP2ND_ERROR_ARGUMENT = 4,    /* an argument of the call makes no sense */
  BOP2ND_ERROR_LIMIT = 5,       /* more memory or work than the limits allow */
  BOP2ND_ERROR_MEMORY = 6       /* the system has no memory left */
} bop2nd_status;

typedef enum bop2nd_dtype {
  BOP2ND_FLOAT32 = 0,
  BOP2ND_INT32 = 1, /* words of 32 signs; bit 1 means -1 */
  BOP2ND_INT64 = 2, /* sizes that a network gives back */
  BOP2ND_INT8 = 3,
  BOP2ND_UINT8 = 4 /* images as a camera gives them, where the network takes them */
} bop2nd_dtype;

/* What a network may take. 0 stands for the default. Besides, loading takes memory in proportion to the file,
 * and for each mean, convolution or dense layer of real numbers lists of at most 2^24 numbers. */
typedef struct bop2nd_limits {
  uint64_t file_bytes;   /* of the file; default 2^32 */
  uint64_t run_bytes;    /* of all results of a run that are held at one time; default 2^30 + 4096 for every
                            byte of the inputs */
  uint64_t run_products; /* multiply-accumulates and operations of a run; default 2^50 */
} bop2nd_limits;

/* An array. Of inputs everything is given by the caller, of outputs everything by bop2nd_run; then `data`
 * belongs to the context and is valid until its next run. */
typedef struct bop2nd_tensor {
  void* data; /* inputs are only read */
  bop2nd_dtype dtype;
  int32_t n_axes;
  int64_t shape[BOP2ND_MAX_AXES];
  const int64_t* strides; /* of inputs, in elements; NULL: row-major. Of outputs always NULL */
} bop2nd_tensor;

typedef struct bop2nd_tensor_info {
  const char* name; /* of an output: its place in the result, "0", "logits" or "pair.1"; lives as long as the
                       network */
  bop2nd_dtype dtype;
  int32_t n_axes;
  int64_t shape[BOP2ND_MAX_AXES];     /* of the example that the network was converted with */
  uint8_t free_axis[BOP2ND_MAX_AXES]; /* inputs: 1 where another size may be given. Outputs: 0 */
} bop2nd_tensor_info;

/* One operation of a run. */
typedef struct bop2nd_step_profile {
  const char* name; /* lives until the context's next run with inputs of other shapes */
  const char* kind; /* layer kind or operator; the same */
  double seconds;
  double products; /* multiply-accumulates; 0 for operations that have none */
} bop2nd_step_profile;

/* "1.0.0" */
BOP2ND_API const char* bop2nd_version(void);
/* The instruction set in use, "avx512_bitalg" say. */
BOP2ND_API const char* bop2nd_instruction_set(void);
/* Of the last call of this thread that failed, "" where none did: calls that succeed leave it as it is. Valid
 * until the thread's next call that fails. */
BOP2ND_API const char* bop2nd_last_error(void);

/* Loads a packed file. It is mapped into memory: it must not change before network and contexts are freed.
 * `limits` may be NULL. */
BOP2ND_API bop2nd_status bop2nd_load_file(const char* path, const bop2nd_limits* limits,
                                          bop2nd_network** network);
/* The same from memory, which is not copied: it has to stay until network and contexts are freed. */
BOP2ND_API bop2nd_status bop2nd_load_memory(const void* bytes, size_t n_bytes, const bop2nd_limits* limits,
                                            bop2nd_network** network);
/* Contexts may outlive the network. NULL is allowed. */
BOP2ND_API void bop2nd_free(bop2nd_network* network);

BOP2ND_API int32_t bop2nd_n_inputs(const bop2nd_network* network);
BOP2ND_API bop2nd_status bop2nd_input_info(const bop2nd_network* network, int32_t i,
                                           bop2nd_tensor_info* info);
/* Outputs: the tensors and sizes of the result in order, out of tuples, lists and dicts. */
BOP2ND_API int32_t bop2nd_n_outputs(const bop2nd_network* network);
BOP2ND_API bop2nd_status bop2nd_output_info(const bop2nd_network* network, int32_t i,
                                            bop2nd_tensor_info* info);
/* Writes a text of several lines, at most `capacity` bytes with its final 0; returns the bytes that the whole
 * text takes with its 0. */
BOP2ND_API size_t bop2nd_describe(const bop2nd_network* network, char* text, size_t capacity);

/* `n_threads`, 1 to 1024: how many threads compute a run, the caller's among them. They sleep between calls.
 * After a fork, contexts of the parent compute on one thread in the child. */
BOP2ND_API bop2nd_status bop2nd_context_new(const bop2nd_network* network, int32_t n_threads,
                                            bop2nd_context** context);
BOP2ND_API void bop2nd_context_free(bop2nd_context* context);

/* Inputs in the order of bop2nd_input_info, outputs in that of bop2nd_output_info. The first run with inputs
 * of some shapes makes the plan and takes the memory; the next ones with the same shapes reuse both. */
BOP2ND_API bop2nd_status bop2nd_run(bop2nd_context* context, const bop2nd_tensor* inputs, int32_t n_inputs,
                                    bop2nd_tensor* outputs, int32_t n_outputs);
/* Runs and measures every operation. Writes at most `capacity` of them; `*n_steps` is how many there are. */
BOP2ND_API bop2nd_status bop2nd_profile(bop2nd_context* context, const bop2nd_tensor* inputs,
                                        int32_t n_inputs, bop2nd_step_profile* steps, int32_t capacity,
                                        int32_t* n_steps);

#ifdef __cplusplus
}
#endif

#endif
