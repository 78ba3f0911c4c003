/* SPDX-License-Identifier: Apache-2.0
 * Classes of images by a packed network: predict model.safetensors images.npy (float32 [N, C, H, W],
 * row-major).
 */
#include <bop2nd_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(bop2nd_status status) {
  if (status == BOP2ND_OK) return;
  fprintf(stderr, "%s\n", bop2nd_last_error());
  exit(1);
}

int main(int argc, char** argv) {
  unsigned char head[10];
  char text[1024] = "";
  bop2nd_network* network;
  bop2nd_context* context;
  bop2nd_tensor image = {0}, logits;
  if (argc != 3) return fprintf(stderr, "usage: %s MODEL.safetensors IMAGES.npy\n", argv[0]), 2;
  FILE* file = fopen(argv[2], "rb");
  if (!file || fread(head, 1, 10, file) != 10 || head[9] > 2) return fprintf(stderr, "no .npy file\n"), 1;
  size_t header = head[8] + 256u * head[9], n = fread(text, 1, header, file), n_values = 1;
  const char* shape = strstr(text, "'shape': (");
  if (n != header || !strstr(text, "<f4") || !shape) return fprintf(stderr, "no float32 array\n"), 1;
  shape += strlen("'shape': (");
  image.n_axes = 4, image.shape[0] = 1;
  sscanf(shape, "%*d, %ld, %ld, %ld", &image.shape[1], &image.shape[2], &image.shape[3]);
  for (int axis = 1; axis < 4; ++axis) n_values *= (size_t)image.shape[axis];

  check(bop2nd_load_file(argv[1], NULL, &network));
  check(bop2nd_context_new(network, 1, &context));
  for (image.data = malloc(4 * n_values); fread(image.data, 4, n_values, file) == n_values;) {
    check(bop2nd_run(context, &image, 1, &logits, 1));
    const float* values = logits.data;
    int best = 0;
    for (int i = 1; i < logits.shape[1]; ++i) best = values[i] > values[best] ? i : best;
    printf("%d\n", best);
  }
  free(image.data), fclose(file);
  bop2nd_context_free(context), bop2nd_free(network);
  return 0;
}
