"""Tries an installed fusedopt, as a user has it: `python smoke.py [--triton]`, in an environment with nothing else.

Without the option there must be no triton; with it, every optimizer takes its step in Triton's interpreter too
(TRITON_INTERPRET=1). Fails at the first thing that does not work.
"""

import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path


def check_what_is_installed(with_triton: bool) -> None:
    """The wheel, not a folder that happens to be there; with its marker for type checkers."""
    import fusedopt

    assert "site-packages" in fusedopt.__file__, f"this is not the installed package: {fusedopt.__file__}"
    assert importlib.metadata.version("fusedopt") == fusedopt.__version__
    assert files("fusedopt").joinpath("py.typed").is_file()
    assert (find_spec("triton") is not None) == with_triton, f"triton is {'not ' * with_triton}installed"


def import_every_module(with_triton: bool) -> None:
    """Nothing was left out of the wheel. The kernels need triton."""
    number = 0
    for package in ("fusedopt", "fusedopt_kernels"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            try:
                importlib.import_module(module.name)
                number += 1
            except ModuleNotFoundError as error:
                if with_triton or error.name is None or not error.name.startswith("triton"):
                    raise
    print(f"{number} modules")


def take_steps(backend: str) -> None:
    """One step of each optimizer moves every weight, and its state goes through a checkpoint."""
    import torch

    import fusedopt

    for kind in (fusedopt.AdamW, fusedopt.Adafactor, fusedopt.Lion, fusedopt.AdamWeightDecay):
        for dtype in (torch.float32, torch.bfloat16):
            model = torch.nn.ParameterList(torch.ones(shape, dtype=dtype) for shape in ((8, 6), (5,)))
            options = {} if dtype is torch.float32 else {"master_weights": True}
            optimizer = kind(model.parameters(), backend=backend, **options)
            optimizer.apply_gradients([(torch.ones_like(p), p) for p in model.parameters()])
            weights = fusedopt.float32_parameters(optimizer, model).values()
            assert all(bool((w < 1.0).all()) for w in weights), f"{kind.__name__} has not moved {dtype} weights"
            kind(model.parameters(), **optimizer.defaults).load_state_dict(optimizer.state_dict())
        print(f"{kind.__name__}, {backend}")


def follow_a_schedule() -> None:
    """The rates of a run are those of its schedule, and there is a picture of it."""
    import torch

    import fusedopt

    optimizer = fusedopt.AdamW([torch.nn.Parameter(torch.ones(3))], lr=1.0)
    scheduler = fusedopt.get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=4)
    recorder = fusedopt.LRRecorder(optimizer)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert recorder.rates.ravel().tolist() == [0.0, 0.5, 1.0, 0.5], recorder.rates
    fusedopt.plot_schedule("cosine", num_warmup_steps=1, num_training_steps=10)


def call_commands() -> None:
    """The script that was installed, and `python -m fusedopt`: in a folder where `-m` finds no other fusedopt."""
    import fusedopt

    def output(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(sys.executable).parent)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    script = str(Path(sys.executable).with_name("fusedopt"))
    for arguments in (["--help"], ["plan", "gpt2", "--fsdp", "2"]):
        assert output(script, *arguments)
    assert output(sys.executable, "-m", "fusedopt", "--version") == f"fusedopt {fusedopt.__version__}\n"
    print(output(script, "info"))


def main(arguments: list[str]) -> None:
    with_triton = arguments == ["--triton"]
    check_what_is_installed(with_triton)
    import_every_module(with_triton)
    for backend in ("eager", "triton") if with_triton else ("eager",):
        take_steps(backend)
    follow_a_schedule()
    call_commands()
    print(f"everything works, with{'' if with_triton else 'out'} triton")


if __name__ == "__main__":
    main(sys.argv[1:])
