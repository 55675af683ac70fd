"""What GradientAccumulator launches on a GPU that need not be here; prints JSON. Runs without Triton's interpreter."""

import json

import torch

from fusedopt.accumulate import GradientAccumulator
from perf.compiled import fake_gpu, resources


def main() -> None:
    with fake_gpu("sm_90") as launches:
        counts = {}
        for name, sizes in {"1,000 aligned": range(16, 16016, 16), "odd ones among them": range(8, 24)}.items():
            accumulator = GradientAccumulator(torch.float32, backend="triton")
            counts[name] = []
            for weight in (1.0, 2.0, torch.tensor(3.0)):
                before = len(launches)
                accumulator([torch.zeros(size, dtype=torch.bfloat16) for size in sizes], weight)
                counts[name].append(len(launches) - before)
        aligned = [launch for launch in launches if launch.constants["A"].aligned and launch.constants["A"].previous]
    found = {
        "launches": counts,
        "compilations": len({id(launch.code) for launch in launches}),
        "aligned": resources(aligned[0].code)._asdict(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
