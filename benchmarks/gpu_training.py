"""The training step that ``benchmarks.gpu`` measures: BinaryNet, eager and as a CUDA graph, and its twin."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .gpu_setting import Contender, Setting
from .registry import GateError


class Training:
    """BinaryNet, ours with Bop2ndOrder or its fake-quantized twin with Adam, in bf16 autocast."""

    def __init__(self, s: Setting, ours: bool) -> None:
        import bop2nd_fast as bf

        from .latent_network import twin

        torch.manual_seed(7)
        image, batch = s.size(32, 10), s.size(50, 2)
        model: torch.nn.Module = bf.models.BinaryNet(width=s.size(128, 4), image_size=image)
        model = (model if ours else twin(model)).to(s.device)
        self.x = s.normal(batch, 3, image, image)
        self.labels = torch.arange(batch, device=s.device) % 10
        graphs = not s.dry
        if ours:
            binary, real = bf.optim.split_parameters(model)
            self.words = [p.words for p in binary if isinstance(p, bf.BinaryTensor)]
            self.optimizers = [
                bf.optim.Bop2ndOrder(binary, gamma=1e-4, sigma=1e-3, capturable=graphs),
                torch.optim.Adam(real, lr=0.01, capturable=graphs),
            ]
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            self.optimizers = [torch.optim.Adam(trained, lr=0.01, fused=graphs)]
        self.model, self.kind = model, torch.device(s.device).type

    def step(self) -> Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.kind, dtype=torch.bfloat16):
            loss = F.cross_entropy(self.model(self.x).float(), self.labels)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def captured(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.step()
        return graph


def _peak_bytes(s: Setting, ours: bool) -> dict[str, float]:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    training = Training(s, ours)
    training.step()
    torch.cuda.reset_peak_memory_stats()
    training.step()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}


def training_case(s: Setting) -> Iterator[Contender]:
    import bop2nd_fast as bf

    def same_as_reference() -> None:
        losses = {}
        for backend in ("triton", "reference"):
            with bf.backends.use(backend):
                training = Training(s, True)
                losses[backend] = [float(training.step()) for _ in range(s.size(2, 1))]
        if not all(abs(a - b) < 0.05 for a, b in zip(*losses.values(), strict=True)):
            raise GateError(f"losses {losses}")

    def finite(training: Training) -> None:
        if not math.isfinite(float(training.step())):
            raise GateError("the loss is not finite")

    ours, twin = Training(s, True), Training(s, False)
    memory = (None, None) if s.dry else (lambda: _peak_bytes(s, True), lambda: _peak_bytes(s, False))
    yield Contender("ours, eager", [ours.step], same_as_reference, extra=memory[0])
    yield Contender("fake-quantized, eager", [twin.step], lambda: finite(twin), extra=memory[1])
    if s.dry:
        return
    replayed, eager = Training(s, True), Training(s, True)
    graph = replayed.captured()

    def like_eager() -> None:
        for _ in range(3):
            eager.step()
        for _ in range(2):
            graph.replay()
            loss = eager.step()
        differ = sum(int((a != b).sum()) for a, b in zip(replayed.words, eager.words, strict=True))
        if differ > 0.02 * sum(w.numel() for w in eager.words) or abs(float(loss - replayed.loss)) > 0.1:
            raise GateError(f"{differ} words, losses {float(loss)} and {float(replayed.loss)} differ")

    yield Contender("ours, CUDA graph", [graph.replay], like_eager)
