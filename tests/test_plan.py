"""`fusedopt plan`: shapes are those of transformers, bytes those of real allocations."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt import backends, cli
from fusedopt.plan import CHOICES, PRESETS, Choice, plan_run
from fusedopt.plan.costs import cost
from fusedopt.plan.families import FAMILIES, Weight
from fusedopt.plan.mesh import Shard, shards
from fusedopt.plan.models import model_of
from fusedopt.warn import warn_once
from perf.cases import CASES, DTYPES

ROOT = Path(__file__).parent.parent

# Models.

SMALL = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 100, "head_dim": 32, "pad_token_id": 0},
}
SMALL_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 50, "n_inner": 80}
CONFIGS = {
    **{kind: (kind, SMALL_GPT2 if kind == "gpt2" else SMALL) for kind in FAMILIES},
    "llama, biases": ("llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {**SMALL, "tie_word_embeddings": True}),
    "llama, no head_dim": ("llama", {**SMALL, "head_dim": None, "num_key_value_heads": None}),
    "qwen3, biases": ("qwen3", {**SMALL, "attention_bias": True}),
    "gpt2, untied": ("gpt2", {**SMALL_GPT2, "tie_word_embeddings": False, "n_inner": None}),
    "gpt_neox, no biases": ("gpt_neox", {**SMALL, "attention_bias": False}),
}
ALONG = {"embedding_rowwise": 0, "colwise": 0, "colwise_gather_output": 0, "rowwise": 1, "rowwise_split_input": 1}
"""Which dimension of a matrix transformers splits."""


@pytest.mark.parametrize("kind, fields", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_of_transformers(kind, fields, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **fields)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        module = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    model = model_of(tmp_path / "config.json")
    assert {w.name: w.shape for w in model.weights} == {n: tuple(p.shape) for n, p in module.named_parameters()}
    assert len(model.weights) == len(list(module.parameters()))
    for pattern, how in module._tp_plan.items():
        for w in model.weights:
            if how in ALONG and re.fullmatch(pattern.replace("*", r"\d+") + r"(\.weight|)", w.name):
                assert w.split == len(w.shape) - 2 + ALONG[how], w


def test_tensor_parallelism_splits_experts_and_transposed_matrices_along_what_is_hidden():
    hidden = {"mixtral": 96, "gpt2": 80}
    for kind, fields in (CONFIGS["mixtral"], CONFIGS["gpt2"]):
        for w in model_of({"model_type": kind, **fields, "num_local_experts": 8}).weights:
            if "experts" in w.name or "mlp.c_" in w.name:
                sides = {hidden[kind], 2 * hidden[kind]}
                assert [d for d, n in enumerate(w.shape) if n in sides] == ([w.split] if w.split is not None else [])


@pytest.mark.parametrize(
    "preset, numel",
    [
        ("gpt2", 124_439_808),
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
        ("llama-405b", 405_853_388_800),
    ],
)
def test_presets_have_as_many_parameters_as_was_published(preset, numel):
    assert model_of(preset).numel == numel


def test_every_preset_is_tested():
    assert len(PRESETS) == 5


def mistake(**kw):
    return lambda folder: plan_run(**kw)


def file_with(text):
    def plan(folder):
        (folder / "config.json").write_text(text)
        return plan_run(folder)

    return plan


def lazy(folder):
    return plan_run(nn.LazyLinear(3))


class Sharded(nn.Module):
    def __init__(self, sharded):
        super().__init__()
        self.p = sharded


MISTAKES = {
    "model_type 't5'; planned are gemma": mistake(model={"model_type": "t5"}),
    "model_type None": mistake(model={}),
    "no preset and no file is called 'gpt3'": mistake(model="gpt3"),
    "cannot read .* as JSON": file_with("{"),
    "model_type None; planned": file_with("[1]"),
    "lacks hidden_size, which a model of type 'llama' has": mistake(
        model={"model_type": "llama", "num_attention_heads": 4}
    ),
    "hidden_size in config.json must be a whole number": mistake(
        model={"model_type": "llama", **SMALL, "hidden_size": 1.5}
    ),
    "tp=3 does not divide the 8 heads": mistake(model="llama-8b", tp=3),
    "tp=2 needs to know how Linear is split": mistake(model=nn.Linear(2, 2), tp=2),
    "fsdp must be a whole number of processes": mistake(model="gpt2", fsdp=0),
    "memory must be above 0": mistake(model="gpt2", memory=0.0),
    "no parameter that requires a gradient": mistake(model=nn.Linear(2, 2).requires_grad_(False)),
    "weight of LazyLinear is lazy": lazy,
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_sentence(message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        MISTAKES[message](tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_module_that_is_sharded_already_is_refused():
    from helpers.loops import Net, sharded

    with sharded(Net()) as model, pytest.raises(ValueError, match="before it is sharded"):
        plan_run(model)


# Memory, against allocations.


class Odd(nn.Module):
    """Parameters of every number of dimensions, and some that are not trained."""

    def __init__(self, **where):
        super().__init__()
        self.linear = nn.Linear(33, 17, **where)
        self.conv = nn.Conv2d(3, 5, 3, **where)
        self.wide = nn.Linear(70, 40, bias=False, **where)
        self.scale = nn.Parameter(torch.ones((), **where))
        self.frozen = nn.Parameter(torch.ones(7, 5, dtype=torch.float16), requires_grad=False)


needs_triton = pytest.mark.skipif(not backends.has_triton(), reason="the kernels need triton")
IDS = [f"{c.optimizer.__name__}-{c.dtype}-{'-'.join(c.options)}-{c.options.get('state_dtype')}" for c in CHOICES]


@needs_triton
@pytest.mark.parametrize("choice", CHOICES, ids=IDS)
def test_a_plan_is_what_an_optimizer_allocates(choice, device):
    model, max_grad_norm = Odd(), 1.0 if choice.dtype is torch.float32 else None
    (row,) = plan_run(Odd(device="meta"), choices=[choice], max_grad_norm=max_grad_norm).rows
    trained = [nn.Parameter(p.detach().to(device, choice.dtype)) for p in model.parameters() if p.requires_grad]
    optimizer = choice.optimizer(trained, **choice.options, max_grad_norm=max_grad_norm, backend="triton")
    for p in trained:
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    assert row.weights == sum(p.nbytes for p in trained) + model.frozen.nbytes
    assert row.gradients == sum(p.grad.nbytes for p in trained)
    assert row.states == sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert row.workspace == optimizer.workspace_bytes()
    assert row.total == row.weights + row.gradients + row.states + row.workspace
    assert row.all_reduces == row.all_reduced == 0


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Lion"])
def test_a_plan_with_statistics_is_what_an_optimizer_allocates(name, device):
    choice = Choice(getattr(fusedopt, name), torch.float32)
    plain, row = (
        plan_run(Odd(device="meta"), choices=[choice], track_statistics=measured).rows[0] for measured in (False, True)
    )
    trained = [nn.Parameter(p.detach().to(device)) for p in Odd().parameters() if p.requires_grad]
    optimizer = choice.optimizer(trained, backend="triton", track_statistics=True)
    for _ in range(2):
        for p in trained:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert row.workspace == optimizer.workspace_bytes() > plain.workspace
    assert row.total - plain.total == row.workspace - plain.workspace
    pieces = sum(-(-p.numel() // 2048) for p in trained)
    assert name == "Adafactor" or row.workspace - plain.workspace == 40 * (pieces + len(trained))


def test_collective_operations_with_statistics_are_those_of_the_plan(monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    weights = [Weight("rows", (12, 4), 0), Weight("more", (8, 2), 0)]
    choice = Choice(fusedopt.AdamW, torch.float32, {"track_statistics": True})
    row = cost(choice, shards(weights, 4, 1), [])
    calls = []
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        local = [(torch.ones(w.shape[0] // 4, w.shape[1]), [Shard(0)]) for w in weights] + [
            (torch.ones(3), [Replicate()])
        ]
        params = [nn.Parameter(DTensor.from_local(t, mesh, how, run_check=False)) for t, how in local]
        optimizer = choice.optimizer(params, **choice.options, backend="eager")
        for p in params:
            p.grad = torch.ones_like(p)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, op, group: calls.append(t.nbytes))
        optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    assert (len(calls), sum(calls)) == (row.all_reduces, row.all_reduced) == (2, 2 * (5 + 1) * 8)


def test_a_preset_is_planned_as_its_module_is():
    """Parameters in another order, and matrices as they are."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("llama", **SMALL)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config)
    for fsdp in (1, 8):
        assert plan_run(module, fsdp=fsdp).rows == plan_run(config.to_dict(), fsdp=fsdp).rows


def test_what_a_process_has_of_shards():
    """`tests/test_sharding.py` counts states and all-reduces of four processes."""
    weights = [Weight("rows", (9, 6), 0), Weight("columns", (5, 7), 1), Weight("vector", (11,)), Weight("one", ())]
    for row in (cost(choice, shards(weights, 2, 2), []) for choice in CHOICES):
        assert row.weights == row.gradients == {"float32": 4, "bfloat16": 2}[row.dtype] * (3 * 6 + 3 * 4 + 6 + 1)


def test_the_first_process_has_the_largest_shards():
    weights = [Weight("w", (50257, 768), 0)]
    assert shards(weights, 64, 1)[0].shape == (786, 768)  # 63 processes have 786 rows, and the last 739
    assert shards(weights, 64, 8)[0].shape == (99, 768)
    assert shards([Weight("w", (4096, 14336), 1)], 64, 8)[0].shape == (64, 1792)
    assert shards([Weight("v", (3,))], 64, 8)[0].shape == (1,)
    assert shards(weights, 1, 1) == [Shard((50257, 768), None)]


# What a step moves.


@pytest.mark.parametrize(
    "case", [c for c in CASES if len(set(DTYPES[c.dtypes])) == 1], ids=lambda c: f"{c.rule}-{c.name}"
)
def test_a_step_moves_what_the_roofline_counts(case):
    """`tests/test_perf.py` holds the roofline against every load and store of the kernels."""
    from perf.providers import RULES

    rule = RULES[case.rule]
    limit = {} if rule.max_grad_norm is None else {"max_grad_norm": rule.max_grad_norm}
    kind = getattr(fusedopt, rule.ours)
    choice = Choice(kind, DTYPES[case.dtypes][0], {**rule.options, **case.options, **limit})
    (row,) = plan_run(nn.Linear(4096, 4096, bias=False, device="meta"), choices=[choice]).rows
    rows_and_columns = 2 * 8192 * max(4, choice.dtype.itemsize) if kind is fusedopt.Adafactor else 0
    assert row.moved == case.floor * 4096**2 + rows_and_columns


def test_without_a_scale_of_the_parameter_weights_are_read_once():
    options = {"scale_parameter": False, "relative_step": False, "lr": 1e-3}
    (row,) = plan_run(nn.Linear(64, 64, bias=False), choices=[Choice(fusedopt.Adafactor, torch.float32, options)]).rows
    assert row.moved == 4 * (5 * 64 * 64 + 2 * 128)


# The command.


def run(*arguments):
    try:
        return cli.main(["plan", *arguments])
    except SystemExit as end:
        return end.code


def test_help_names_presets_and_model_types(capsys):
    assert run("--help") == 0
    printed = capsys.readouterr().out
    for name in (*PRESETS, *FAMILIES, "--fsdp", "--tp", "--bandwidth", "--fits", "--clip", "--statistics", "--json"):
        assert name in printed
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.parametrize("bad", [["--fits", "80XB"], ["--bandwidth", "fast"], ["--tp", "7"], ["--fsdp", "0"]], ids=str)
def test_a_bad_option_is_one_sentence(bad, capsys):
    assert run("llama-8b", *bad) == 2
    printed = capsys.readouterr()
    assert not printed.out and len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("preset, mesh", [("gpt2", []), ("llama-70b", []), ("llama-405b", ["--fsdp=64", "--tp=8"])])
def test_the_table_lines_up_in_120_columns(preset, mesh, capsys):
    assert run(preset, *mesh, "--bandwidth=3.0TB/s", "--fits=80GB", "--clip") == 0
    title, table, notes = capsys.readouterr().out.split("\n\n")
    lines = table.splitlines()
    assert all(len(line) <= 120 for line in (title, *lines, *notes.splitlines()))
    assert len(lines) == 2 + len(CHOICES)
    assert {len(line) for line in lines if "all-reduces" in line} == {len(line) for line in lines[2:]}
    for name in ("precision", "moments"):
        assert all(line[lines[0].index(name) - 1] == " " != line[lines[0].index(name)] for line in lines[2:])
    assert title.startswith(PRESETS[preset][0])
    assert "step = moved / 3 TB/s" in notes


def test_json_has_what_the_table_has(capsys):
    assert run("llama-8b", "--fsdp=8", "--fits=12GB", "--bandwidth=3.0TB/s", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    plan = plan_run("llama-8b", fsdp=8, memory=12e9, bandwidth=3e12)
    assert [row["total"] for row in printed["rows"]] == [row.total for row in plan.rows]
    for row in printed["rows"]:
        assert row["fits"] == (row["total"] <= 12e9)
        assert row["milliseconds"] == row["moved"] / 3e12 * 1e3
    assert 0 < sum(row["fits"] for row in printed["rows"]) < len(CHOICES)
    marked = [line.startswith("*") for line in str(plan).split("\n\n")[1].splitlines()[2:]]
    assert marked == [row["fits"] for row in printed["rows"]]


def test_statistics_are_in_the_plan_of_the_command(capsys):
    workspaces = []
    for options in ([], ["--statistics"]):
        assert run("gpt2", "--json", *options) == 0
        workspaces.append([row["workspace"] for row in json.loads(capsys.readouterr().out)["rows"]])
    assert all(plain < with_statistics < plain + 124_439_808 * 0.02 for plain, with_statistics in zip(*workspaces))


def test_without_triton_a_plan_says_what_it_does_not_know(monkeypatch):
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    plan = plan_run("gpt2", fsdp=2)
    assert plan.rows[0].workspace is None and plan.rows[0].all_reduces is None
    assert "?: known where triton is installed" in str(plan)
    json.dumps(plan.data())


def test_a_plan_warns_of_nothing_and_leaves_no_process_group():
    """Not even of moments that would freeze: none of these parameters is ever updated."""
    warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_run("gpt2", fsdp=4, tp=2, choices=[Choice(fusedopt.AdamW, torch.bfloat16)])
    assert not torch.distributed.is_initialized()


EXAMPLES = re.findall(r"```console\n\$ fusedopt (plan .*)\n((?:.*\n)*?)```", (ROOT / "docs" / "plan.md").read_text())


@needs_triton
@pytest.mark.parametrize("command, printed", EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_examples_of_the_docs_are_what_the_command_prints(command, printed, capsys):
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out == printed


def test_there_are_examples():
    assert len(EXAMPLES) >= 2
