"""Every CUDA kernel once, on small and odd shapes, compared with the reference: what compute-sanitizer runs.

``python -m tests.gpu_once``. Not under pytest: each launch costs a hundred times as much there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn import DistillationLoss, SparseLinear

Run = Callable[[str], Tensor]  # backend -> the result

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def int8_matmul(device: str) -> Iterator[tuple[str, Run]]:
    """Few tokens, tiles with tails on every side, a K that no vector divides, a split sum."""
    shapes = ((1, 64, 48), (5, 4096, 40), (17, 31, 33), (130, 257, 129), (64, 2048, 64))
    for (m, k, n), dtype, mode in product(shapes, DTYPES, ("dynamic", "static", "weight_only")):
        if mode == "weight_only" and m > 16:  # Triton's
            continue
        x = torch.randn(m, k, device=device).to(dtype)
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        scale, bias = torch.rand(n, device=device) / 127 + 1e-3, torch.randn(n, device=device)
        given = {}
        if mode == "static":
            given = {
                "input_scale": torch.tensor([6 / 255], device=device),
                "input_zero_point": torch.tensor([128], dtype=torch.int32, device=device),
            }
        call = (x, weight, scale, bias)
        yield (
            f"int8_matmul {m}x{k}x{n} {dtype} {mode}",
            lambda backend, call=call, mode=mode, given=given: ops.int8_linear(
                *call, mode=mode, activation="gelu", backend=backend, **given
            ),
        )


def sparse_linear(device: str) -> Iterator[tuple[str, Run]]:
    """The bitmap, and 2:4 where its shapes fit."""
    for (m, k, n), weights in product(((1, 128, 96), (7, 200, 33), (40, 256, 128)), ("bfloat16", "float16", "int8")):
        dtype = torch.float16 if weights == "float16" else torch.bfloat16
        x = torch.randn(m, k, device=device).to(dtype)
        for form in ("bitmap", "index"):
            if form == "index" and k % 64:
                continue
            scores = torch.rand(n, k // 4, 4, device=device)
            mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(2).indices, True).view(n, k)
            linear = nn.Linear(k, n, device=device, dtype=dtype)

            def run(
                backend: str, linear: nn.Linear = linear, mask: Tensor = mask, x: Tensor = x, form: str = form,
                weights: str = weights,
            ) -> Tensor:  # fmt: skip
                given = form if backend == "cuda" else "auto"
                layer = SparseLinear.from_dense(linear, mask, dtype=weights, format=given, backend=backend)
                with torch.no_grad():
                    return layer(x)

            yield f"sparse_linear {form} {m}x{k}x{n} {weights}", run


def distill_loss(device: str) -> Iterator[tuple[str, Run]]:
    """Rows that fit a warp, a block, and none; with a hard term and ignored tokens."""
    for (t, v), dtype, divergence in product(
        ((9, 10), (5, 1001), (3, 33000)), DTYPES, ("forward_kl", "reverse_kl", "jsd")
    ):
        student, teacher = (torch.randn(t, v, device=device).to(dtype) for _ in range(2))
        labels = torch.randint(v, (t,), device=device)
        labels[0] = -100

        def run(
            backend: str, student: Tensor = student, teacher: Tensor = teacher, labels: Tensor = labels,
            divergence: str = divergence,
        ) -> Tensor:  # fmt: skip
            leaf = student.clone().requires_grad_()
            loss = DistillationLoss(temperature=2.0, divergence=divergence, backend=backend)(leaf, teacher, labels)
            loss.backward()
            assert leaf.grad is not None
            return torch.cat([loss.detach().float().view(1), leaf.grad.float().flatten()])

        yield f"distill_loss {t}x{v} {dtype} {divergence}", run


def main(device: str = "cuda") -> int:
    """Returns the number of results that differ from the reference's."""
    torch.manual_seed(0)
    wrong = done = 0
    for cases in (int8_matmul, sparse_linear, distill_loss):
        for name, run in cases(device):
            found, expected = run("cuda").float(), run("reference").float()
            error = float((found - expected).norm() / expected.norm().clamp_min(1e-9))
            done += 1
            if not error < 2e-2:
                wrong += 1
                print(f"{name}: differs from the reference by {error:.3g}", flush=True)
    print(f"{done} calls, {wrong} of them wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 98))
