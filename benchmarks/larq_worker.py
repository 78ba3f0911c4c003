"""Runs in an environment with larq_compute_engine: builds, runs and times models on request.

Speaks JSON lines: requests on standard input, answers on standard output. Imports nothing of this project.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # TensorFlow prints to standard output, which carries our answers


def reply(**values: object) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
try:
    import larq
    import larq_compute_engine
    import numpy as np
    import tensorflow as tf
    from larq_compute_engine.tflite.python.interpreter import Interpreter
except ImportError as missing:
    reply(error=f"{type(missing).__name__}: {missing}")
    sys.exit(1)


def binary(x: Any, w: Any, stride: int, same: bool) -> Any:
    """Signs of ``x`` by the signs ``w`` ``[kH, kW, I, O]``; with ``same`` padded with +1."""
    padding = {"padding": "same", "pad_values": 1.0} if same else {"padding": "valid"}
    quantizers = dict.fromkeys(("input_quantizer", "kernel_quantizer"), "ste_sign")
    how = {"strides": stride, "kernel_constraint": "weight_clip", "use_bias": False}
    layer = larq.layers.QuantConv2D(w.shape[3], w.shape[0], **how, **padding, **quantizers)
    return with_weights(layer, x, w)


def with_weights(layer: Any, x: Any, *weights: Any) -> Any:
    y = layer(x)
    layer.set_weights(weights)
    return y


def padded(x: Any, n: int, value: float) -> Any:
    return tf.pad(x, [[0, 0], [n, n], [n, n], [0, 0]], constant_values=value)


def birealnet18(x: Any, weights: Any) -> Any:
    """Bi-Real-Net-18 whose binary convolutions pad with +1; ``weights`` in the order of its layers."""
    layers = tf.keras.layers

    def conv(x: Any, stride: int = 1) -> Any:
        w = next(weights)
        return with_weights(layers.Conv2D(w.shape[3], w.shape[0], stride, use_bias=False), x, w)

    def norm(x: Any) -> Any:
        statistics = [next(weights) for _ in range(4)]
        return with_weights(layers.BatchNormalization(epsilon=1e-5), x, *statistics)

    x = layers.MaxPool2D(3, 2)(padded(norm(conv(padded(x, 3, 0.0), 2)), 1, -1e30))
    for unit in range(16):
        stride = 2 if unit in (4, 8, 12) else 1
        y = norm(binary(padded(x, 1, 1.0) if stride == 2 else x, next(weights), stride, stride == 1))
        x = y + (norm(conv(layers.AveragePooling2D(2)(x))) if stride == 2 else x)
    w, bias = next(weights), next(weights)
    return with_weights(layers.Dense(w.shape[1]), layers.GlobalAveragePooling2D()(x), w, bias)


def build(request: dict[str, Any]) -> tuple[object, object]:
    """An interpreter of a converted model, and its input; writes the output for the gate."""
    folder = Path(request["build"])
    x = np.load(folder / "x.npy")
    with np.load(folder / "weights.npz") as file:
        weights = iter([file[name] for name in file.files])
    given = tf.keras.Input(x.shape[1:], batch_size=x.shape[0])
    if request["network"]:
        output = birealnet18(given, weights)
    else:
        output = binary(given, next(weights), request["stride"], request["same"])
    model = tf.keras.Model(given, output)
    interpreter = Interpreter(larq_compute_engine.convert_keras_model(model), num_threads=1)
    np.save(folder / "y.npy", interpreter.predict(x))
    # `predict` of the inner interpreter takes one batch without the generators around it.
    return interpreter.interpreter, [x]


def main() -> None:
    reply(ready=True)
    models: dict[int, tuple[Any, Any]] = {}
    numbers = itertools.count()
    for line in sys.stdin:
        request = json.loads(line)
        if "build" in request:
            models[handle := next(numbers)] = build(request)
            reply(handle=handle)
        elif "drop" in request:
            del models[request["drop"]]
            reply(dropped=True)
        else:
            interpreter, inputs = models[request["run"]]
            start = time.perf_counter()
            for _ in range(request["n"]):
                interpreter.predict(inputs)
            reply(seconds=time.perf_counter() - start)


main()
