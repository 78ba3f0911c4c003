"""Runs in an environment with larq_compute_engine: builds, runs and times one-layer models on request.

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


def build(request: dict[str, Any]) -> tuple[object, object]:
    """An interpreter of a converted one-layer model, and its input; writes the output for the gate."""
    folder = Path(request["build"])
    x, w = np.load(folder / "x.npy"), np.load(folder / "w.npy")
    padding = {"padding": "same", "pad_values": 1.0} if request["same"] else {"padding": "valid"}
    quantizers = dict.fromkeys(("input_quantizer", "kernel_quantizer"), "ste_sign")
    how = {"strides": request["stride"], "kernel_constraint": "weight_clip", "use_bias": False}
    layer = larq.layers.QuantConv2D(w.shape[3], w.shape[0], **how, **padding, **quantizers)
    model = tf.keras.Sequential([tf.keras.layers.InputLayer(x.shape[1:], batch_size=x.shape[0]), layer])
    layer.set_weights([w])
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
