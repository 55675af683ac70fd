"""Kernels that leave statistics, compiled for a GPU that is not here, as JSON: `python compiled_statistics.py TARGET`.

Run by test_compile.py in a process of its own, without Triton's interpreter.
"""

import json
import sys

from helpers.in_place import in_place

from perf.cases import STATISTICS
from perf.compiled import TARGETS, kernels, resources


def main(target):
    found = [
        {
            "name": name,
            "fusion": launch.code.metadata.enable_fp_fusion,
            "threads": launch.code.metadata.num_warps * TARGETS[target].warp_size,
            "in_place": in_place(launch.code),
            **resources(launch.code)._asdict(),
        }
        for _, name, launch in kernels(target, STATISTICS)
    ]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
