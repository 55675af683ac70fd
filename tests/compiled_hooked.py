"""Every kernel compiled under a hook, as profilers and serving engines install one; see compiled_steps.py.

Prints, by module and name of the kernel, the names of the constants that the hook was given as JSON.
"""

import json
from unittest import mock

import torch
import triton

from fusedopt import Adafactor, AdamW, Lion
from fusedopt.accumulate import GradientAccumulator
from perf.compiled import ADAFACTOR_SHAPES, fake_gpu, shard_step


def main() -> None:
    serialized = {}

    def hook(*, fn, compile, **_):
        constants = json.loads(compile["specialization_data"])["constant_keys"]
        serialized.setdefault(f"{fn.module}.{fn.name}", constants)

    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ADAFACTOR_SHAPES]
    grads = [torch.zeros_like(p) for p in params]
    adafactor = Adafactor(params, backend="triton")
    with (
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook),
        mock.patch.object(triton.knobs.runtime, "jit_post_compile_hook", hook),
        fake_gpu("sm_90"),
    ):
        AdamW(params, max_grad_norm=1.0, track_statistics=True, backend="triton").apply_gradients(zip(grads, params))
        Lion(params, backend="triton").apply_gradients(zip(grads, params))
        adafactor.apply_gradients(zip(grads, params))
        shard_step(adafactor, params, grads)
        GradientAccumulator(torch.float32, backend="triton")(grads)
    print(json.dumps(serialized))


if __name__ == "__main__":
    main()
