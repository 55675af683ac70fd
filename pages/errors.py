"""The page of errors: what can be raised in training, with cause and way out, and every other message."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FOLDERS = ("fusedopt", "kernels")


class Message(NamedTuple):
    """An error or a warning in the code, `…` in the place of values."""

    kind: str
    text: str
    module: str  # path of its file


class Entry(NamedTuple):
    """Messages with the same cause; each is given by a part of its text that no other message has."""

    parts: Sequence[str]
    cause: str
    way_out: str


@cache
def messages() -> tuple[Message, ...]:
    """Returns everything that the package raises or warns of with a text."""
    found = []
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            kind = ast.unparse(call.func)
            if isinstance(node, ast.Raise) or kind.endswith(("warnings.warn", "warn_once")):
                kind = "UserWarning" if "warn" in kind else kind
                text = re.sub("…+", "…", _text(call.args[0]))
                found.append(Message(kind, text, str(path.relative_to(ROOT))))
    return tuple(m for m in found if _says_something(m.text))


def _text(node: ast.expr) -> str:
    """Returns the text of a string in the code, `…` for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"  # a name, or a call


def _says_something(text: str) -> bool:
    return len(text.replace("…", "").strip(" ;:,.")) > 8


@cache
def literals() -> frozenset[str]:
    """Returns all strings in the code of the package: messages are sometimes put together of several."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.Constant, ast.JoinedStr)):
                    found.add(_text(node))
    return frozenset(found)


TRAINING: Mapping[str, Sequence[Entry]] = {
    "Making the optimizer": (
        Entry(
            ["backend='triton' cannot work: …", "backend='triton' cannot update parameters on"],
            "triton is missing or too old, or the parameters are not on a CUDA or ROCm device.",
            'Install triton, or pass `backend="auto"`, which takes the eager path where kernels cannot run.',
        ),
        Entry(
            ["without its kernels, much slower than with them"],
            "The parameters are on a GPU, and triton is missing or too old.",
            'Install triton; `backend="eager"` says that you mean it.',
        ),
        Entry(
            ["comes twice in the param groups"],
            "A tied weight was collected by hand, or two groups overlap.",
            "List it once; `model.parameters()` does.",
        ),
        Entry(
            ["only dense parameters can be updated"],
            "The parameter itself is sparse or quantised.",
            "Use `torch.optim.SparseAdam` for it, in an optimizer of its own.",
        ),
        Entry(
            ["parameters must be float16, bfloat16, float32 or float64; for"],
            "An integer, 8-bit or complex parameter.",
            "Freeze it, or pass `torch.view_as_real` of a complex one.",
        ),
        Entry(
            ["has several elements in one place of memory (an expanded tensor?)", "in one place of memory now"],
            "A parameter was made with `expand`, so that one number in memory is several elements.",
            "Pass the tensor before it was expanded, or a clone.",
        ),
        Entry(
            ["an option of torch.optim: here backend="],
            "`fused=`, `foreach=`, `capturable=` or another option that torch's optimizers have.",
            "Leave it out: every step is fused and can be captured.",
        ),
        Entry(
            ["which goes for the whole optimizer"],
            "A param group has an option, such as `max_grad_norm`, that cannot differ between groups.",
            "Give it to the constructor.",
        ),
        Entry(
            ["is matched with the names of parameters, and there are none"],
            "`include_in_weight_decay` or `exclude_from_weight_decay` without names to search in.",
            "Pass `model.named_parameters()`.",
        ),
        Entry(
            ["bfloat16 parameters and moments are rounded to nearest"],
            "beta2 is 0.99 or more and precision is left at its default: v freezes, small updates are lost.",
            "See [Low precision](low-precision.md) and [the primer](primers/second-moment.md).",
        ),
    ),
    "The step": (
        Entry(
            ["the gradient of a parameter of shape … is sparse"],
            "`nn.Embedding(sparse=True)`.",
            "`sparse=False`, or `torch.optim.SparseAdam` for this parameter.",
        ),
        Entry(
            ["does not fit its parameter of shape … on"],
            "The parameter got another shape or device after its gradient was made.",
            "Call `zero_grad()` after such a change and run `backward()` again.",
        ),
        Entry(
            ["the state step of a parameter of shape", "belongs to a parameter of shape", "a step count is"],
            "Something replaced a parameter's data or a state by a tensor of another size, dtype or device.",
            "Delete `optimizer.state[parameter]` to begin anew, or load a checkpoint that fits. Nothing was changed.",
        ),
        Entry(
            ["share memory and both have a gradient"],
            "Two parameters are views of the same memory.",
            "Give the optimizer one of them, and add the gradients.",
        ),
        Entry(
            ["was made in torch.inference_mode()"],
            "The model was built or loaded inside `torch.inference_mode()`.",
            "Build it outside.",
        ),
        Entry(
            ["a lazy parameter has no shape yet", "is lazy and has no shape yet"],
            "`nn.LazyLinear` or the like before its first forward pass.",
            "Run a forward pass first.",
        ),
        Entry(
            [
                "is not a parameter of this optimizer",
                "comes twice; add its gradients first",
                "there is no gradient among",
            ],
            "`apply_gradients` or `effective_lr` got tensors that do not belong to the optimizer's groups.",
            "Pass pairs of (gradient, parameter), each parameter once.",
        ),
        Entry(
            ["scale must be finite, got", "as a tensor must hold one real number"],
            "A `scale` that is NaN or infinite, from a window without tokens for instance.",
            "Skip the step.",
        ),
        Entry(
            ["is no dtype that the kernels read", "has no memory that a kernel could reach"],
            "A tensor subclass, or a dtype that only other packages know.",
            'Convert it, or pass `backend="eager"`.',
        ),
    ),
    "Rates": (
        Entry(
            ["the rate of a param group was set to", "a param group got the rate"],
            "`learning_rate` of `AdamWeightDecay` is a function of the step, and a scheduler sets rates too.",
            "Choose one: a number and a scheduler, or the function alone.",
        ),
        Entry(
            ["learning_rate gives … at step"],
            "The schedule returned NaN or a negative rate, often because the warm-up is as long as the training.",
            "Correct the schedule. The step changed nothing.",
        ),
        Entry(
            ["has lr=None, so there is no rate to schedule", "the optimizer has lr=None"],
            "Adafactor with `relative_step=True` makes its own rates.",
            "Use `AdafactorSchedule` to show them, or pass `relative_step=False, lr=...`.",
        ),
        Entry(
            ["after the scheduler was made: it was made for"],
            "`add_param_group` after the scheduler.",
            "Make the scheduler last.",
        ),
        Entry(
            [
                "the state is that of a scheduler for",
                "the state is that of …, and this is",
                "the state is that of …, and this schedule",
            ],
            "A scheduler's checkpoint of another kind, or for another number of param groups.",
            "Make the scheduler that was saved; its arguments may differ.",
        ),
        Entry(
            ["the best metric of the state was found with mode"],
            "`ReduceLROnPlateau` or `GreedyLR` was saved with another `mode`.",
            "Use the mode that was saved.",
        ),
    ),
    "CUDA graphs": (
        Entry(
            [
                "a CUDA graph is being captured before the optimizer has state",
                "no step before it had tensors of these dtypes",
                "a CUDA graph is being captured before the optimizer counts its steps",
                "an option that needs more state was set before a capture",
                "and every replay of a CUDA graph would convert or move it again",
                "there is no pinned memory for another captured step",
                "no step before it had these limits for norms",
                "before the optimizer counts skipped steps",
                "the states have numbers for random rounding that were loaded",
            ],
            "The capture needs what only a step outside of a graph can make: state, compiled kernels, memory.",
            "Take one step like the captured one before the capture.",
        ),
        Entry(
            ["requires a gradient and has none in the step that is being captured"],
            "A graph updates the parameters that had a gradient when it was captured, and no others.",
            "Give it a gradient in the captured step, or set `requires_grad=False`.",
        ),
        Entry(
            ["of which a CUDA graph would only keep the present value"],
            "A learning rate or scale is a tensor on another device.",
            "Make it a tensor on the parameters' device; a float if it never changes.",
        ),
        Entry(
            ["a rate that is a function of the step is computed on the host"],
            "`AdamWeightDecay` with a function of your own.",
            "Pass a tensor and change it between replays, or a schedule of this package.",
        ),
        Entry(
            ["a CUDA graph is being captured on some of the devices"],
            "One optimizer has parameters on several GPUs, and one of them is capturing.",
            "Use one optimizer per device.",
        ),
        Entry(
            ["a GradientAccumulator cannot run inside a CUDA graph"],
            "Its counts live on the host, where a replay does not move them.",
            "Capture the backward passes without it, or let torch add up in `.grad`.",
        ),
    ),
    "Sharded parameters": (
        Entry(
            ["what is a sum over processes cannot be updated"],
            "A DTensor with `Partial` placements.",
            "Redistribute it to shards or replicas.",
        ),
        Entry(
            ["the processes disagree about a step"],
            "With `check_ranks`: a parameter has a gradient in some processes only, options differ, or one has raised.",
            "The message says what differs where; one that has raised has its own error. Nothing was changed; load a "
            "checkpoint where one has lost a step.",
        ),
        Entry(
            ["a step ran out of memory halfway, its gradients, parameters or states"],
            "An eager step ran out of memory after it had begun to write, and before the next one a gradient, a "
            "parameter or a state was changed in place or replaced.",
            "Load a checkpoint. To go on instead, call `step()` before anything else.",
        ),
        Entry(
            ["the last step ended in an error after it had updated some shards"],
            "The eager Adafactor ran out of memory between two shards; the other processes have gone on since.",
            "Load a checkpoint into all processes.",
        ),
        Entry(
            ["a step of this process failed after all processes had compared"],
            "With `check_ranks`: a step raised, such as for want of memory, when all had agreed to it, so that others "
            "may have taken it. At the next step they raise, too.",
            "Load a checkpoint into all processes.",
        ),
        Entry(
            ["a gradient with placements"],
            "The gradient is sharded in another way than its parameter.",
            "Redistribute the gradient.",
        ),
        Entry(
            ["cannot be numbered, which random rounding needs"],
            "`stochastic_rounding` on a parameter that is sharded along two inner dimensions.",
            "Shard it along one dimension, or its first and one more; or use `master_weights=True`.",
        ),
    ),
    "Step in backward": (
        Entry(
            ["got a second gradient before step()"],
            "Accumulation, or a weight that two checkpointed parts of the model share.",
            "Call `step()` after every `backward()`, or `remove()` the handle.",
        ),
        Entry(
            ["a GradScaler cannot unscale gradients"],
            "The gradients are gone before the scaler sees them.",
            "Train in bfloat16 without a scaler.",
        ),
        Entry(
            ["needs all gradients at once"],
            "`max_grad_norm`, `skip_nonfinite` or `global_clipnorm`.",
            "Leave out one of the two.",
        ),
        Entry(
            ["before DistributedDataParallel has summed"],
            "DDP sums gradients after they were complete.",
            "Use FSDP2 (`fully_shard`).",
        ),
        Entry(
            [
                "of the optimizer is not in the model",
                "has a gradient already: call step()",
                "the optimizer must be one of fusedopt's",
            ],
            "`register_step_in_backward` got an optimizer of another model, or came after a `backward()`.",
            "Register right after making the optimizer.",
        ),
    ),
    "Loading": (
        Entry(
            ["this is no optimizer's checkpoint", "the checkpoint's state of parameter"],
            "The file holds something else: a model, or a whole checkpoint with the optimizer inside.",
            'Pass the part that is the optimizer\'s: `saved["optimizer"]`.',
        ),
        Entry(
            [
                "the checkpoint has … param groups, this optimizer",
                "of the checkpoint has … parameters",
                "of the checkpoint has param_names",
            ],
            "The model or its param groups changed since.",
            "Make the param groups as they were.",
        ),
        Entry(
            ["does not fit …: missing", "of shape …, expected shape", "of type …, expected a tensor"],
            "The states are those of another model, or of another optimizer.",
            "Load it into the optimizer and model that wrote it.",
        ),
        Entry(
            ["the checkpoint is of an Adam with weight_decay"],
            "Adam with L2 regularisation is another update than decoupled decay.",
            "Set `weight_decay` to 0 in the saved groups, if you mean to go on with decoupled decay.",
        ),
        Entry(
            ["as a DTensor, of a sharded run, and the parameter is not sharded"],
            "A sharded checkpoint in an unsharded run.",
            "Gather it with `get_optimizer_state_dict(..., full_state_dict=True)`.",
        ),
        Entry(
            [
                "on the meta device, where tensors have no values",
                "in the layout …, expected a dense tensor",
                "of dtype …, expected",
            ],
            "The checkpoint was read in a way that lost its values or types.",
            'Use `torch.load(path, map_location="cpu", weights_only=True)`.',
        ),
        Entry(
            ["expected a whole number >= 0", "expected a whole number from 0"],
            "A step count that was edited, or went through a format that cannot hold it.",
            "Write a whole number.",
        ),
        Entry(
            ["the state dict does not fit the model", "of the state dict is …, expected a tensor"],
            "`load_float32_parameters` got the weights of another model.",
            "Load those of this architecture.",
        ),
    ),
    "Accumulating gradients": (
        Entry(
            [
                "expected … …, as in the first call",
                "does not fit its sum of shape",
                "the parameters are not those of before",
            ],
            "The accumulator is used for two models, or the list of gradients changed.",
            "One accumulator per list of parameters.",
        ),
        Entry(
            ["this accumulator takes the gradients of parameters", "this accumulator takes lists of gradients"],
            "`accumulate(parameters)` and calls with lists are mixed.",
            "Stay with one of them.",
        ),
        Entry(
            ["there are no gradients yet", "calls add up to 0, so there is no mean"],
            "Nothing was accumulated, or only micro-batches of weight 0.",
            "Skip this update.",
        ),
        Entry(
            [
                "the sums are already those of all processes: call reset() before adding",
                "call reset() before the next window",
            ],
            "`all_reduce()` twice in one window.",
            "Call `reset()` after the update.",
        ),
        Entry(
            ["the processes have … gradients", "was None in the first call of some processes"],
            "A parameter had a gradient in some processes only.",
            "Use `accumulate(parameters)`, where gradients may come later.",
        ),
        Entry(
            ["gradients must be dense and of a floating dtype"],
            "A sparse or integer gradient.",
            "Make it dense.",
        ),
    ),
}
"""What can come up in training, by where it does. Every RuntimeError of the package is here."""


def entry_of(message: str) -> Entry | None:
    """Returns the entry that a message belongs to."""
    every = (entry for entries in TRAINING.values() for entry in entries)
    return next((entry for entry in every if any(part in message for part in entry.parts)), None)


AREAS: Mapping[str, Sequence[str]] = {
    "Options of optimizers": (
        *("fusedopt/checks", "fusedopt/ada", "fusedopt/optimizer", "fusedopt/precision", "fusedopt/backends"),
        *("fusedopt/accumulate", "fusedopt/decay_groups"),
    ),
    "The Keras half": ("fusedopt/keras",),
    "Schedules, plots, verification": ("fusedopt/schedules",),
    "Commands": ("fusedopt/cli", "fusedopt/demo"),
    "Everything else": ("",),
}
"""Groups of the other messages, by the beginning of their file's path; the first that fits counts."""


def page() -> str:
    """Returns both parts of the page as Markdown."""
    found = messages()
    lines = ["## In training", ""]
    for title, entries in TRAINING.items():
        lines += [f"### {title}", ""]
        for entry in entries:
            texts = dict.fromkeys(text for part in entry.parts for text in _shown(part, found))
            lines += [
                *(f"> `{_code(text)}`<br>" for text in texts),
                "",
                f"{entry.cause} **Way out:** {entry.way_out}",
                "",
            ]
    lines += ["## Messages that speak for themselves", ""]
    for title, rest in _by_area(found):
        lines += [f"### {title}", "", *(f"- {kind}: `{_code(text)}`" for kind, text in rest), ""]
    return "\n".join(lines).strip()


def _shown(part: str, found: Sequence[Message]) -> list[str]:
    """Returns the messages that have a part; the part itself where a message is put together of several strings."""
    return [m.text for m in found if part in m.text] or [f"{part} …"]


def _by_area(found: Sequence[Message]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    rest = [m for m in found if entry_of(m.text) is None]
    for title, beginnings in AREAS.items():
        own = [m for m in rest if m.module.startswith(tuple(beginnings))]
        rest = [m for m in rest if m not in own]
        yield title, sorted({(m.kind, m.text) for m in own}, key=lambda row: row[1].lower())


def _code(text: str) -> str:
    return text.replace("`", "'")
