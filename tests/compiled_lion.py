"""What Lion launches on a GPU that need not be here; prints JSON. Runs without Triton's interpreter."""

import json

import torch

from fusedopt import Lion
from perf.compiled import fake_gpu, resources

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    found = {}
    with fake_gpu("sm_90") as launches:
        for name, dtype in DTYPES.items():
            params = [torch.nn.Parameter(torch.zeros(16 * n, dtype=dtype)) for n in range(1, 1001)]
            optimizer = Lion([{"params": params[:7], "lr": 0.1}, {"params": params[7:]}], backend="triton")
            for _ in range(2):
                before = len(launches)
                optimizer.apply_gradients((torch.zeros_like(p), p) for p in params)
            found[name] = {
                "launches": [launch.kernel for launch in launches[before:]],
                "update": resources(launches[-1].code)._asdict(),
                "fusion": launches[-1].code.metadata.enable_fp_fusion,
            }
        found["compilations"] = len({id(launch.code) for launch in launches})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
