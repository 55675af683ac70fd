"""Numbers as users have them: NumPy's and torch's scalars, strings out of YAML, and what is no number at all."""

import json

import numpy as np
import pytest
import torch
from helpers.keras import parameter, step
from helpers.optimizers import OPTIMIZERS

from fusedopt import Adafactor, AdafactorSchedule, AdamW, AdamWeightDecay, PolynomialDecay, WarmUp, create_optimizer
from fusedopt.schedules import GreedyLR, ReduceLROnPlateau, get_linear_schedule_with_warmup, get_scheduler


def sgd(lr=0.1):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def named():
    return [("weight", parameter())]


# Configs.


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor], ids=["float32", "float64", "tensor"])
def test_a_config_is_json_whatever_scalars_it_was_made_of(kind):
    rate, steps = kind(0.25), np.int64(8)
    schedule = WarmUp(rate, WarmUp(rate, PolynomialDecay(rate, steps, kind(0.125), cycle=np.bool_(True)), steps), steps)
    numbers = {"beta_1": 0.5, "beta_2": 0.75, "epsilon": 0.5, "weight_decay_rate": 0.5, "decay": 0.5, "clipvalue": 2.0}
    for learning_rate in (schedule, kind(0.25)):
        options = {name: kind(value) for name, value in numbers.items()}
        if kind is torch.tensor:  # The optimizer's own numbers are never tensors, but for the rate.
            options = {name: np.float64(value) for name, value in numbers.items()}
        optimizer = AdamWeightDecay(named(), learning_rate, **options)
        config = json.loads(json.dumps(optimizer.get_config()))
        assert config == optimizer.get_config() and numbers.items() <= config.items()
        again = AdamWeightDecay.from_config(config, named())
        assert again.get_config() == config
        if learning_rate is schedule:
            assert again.schedule == schedule and again.schedule(3) == 0.09375
        else:
            assert config["learning_rate"] == 0.25


def test_a_config_of_create_optimizer_is_json():
    optimizer, schedule = create_optimizer(
        named(), np.float32(0.5), np.int64(9), np.int32(3), np.float64(0.25), adam_global_clipnorm=np.float32(1.0)
    )
    again = AdamWeightDecay.from_config(json.loads(json.dumps(optimizer.get_config())), named())
    assert again.schedule == schedule == WarmUp(0.5, PolynomialDecay(0.5, 6, 0.125), 3)


KERAS_ADAM = {
    "name": "Adam",
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "jit_compile": True,
    "is_legacy_optimizer": False,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
    "learning_rate": 0.125,
    "beta_1": 0.5,
    "beta_2": 0.75,
    "epsilon": 1e-8,
    "amsgrad": False,
}
"""As Keras writes it, with the options of all its versions since 2.11."""


@pytest.mark.parametrize(
    ("config", "decay"),
    [
        (KERAS_ADAM, 0.0),
        ({**KERAS_ADAM, "name": "AdamW", "weight_decay": 0.25}, 0.25),
        ({"module": "keras.optimizers", "class_name": "Adam", "config": KERAS_ADAM, "registered_name": None}, 0.0),
        ({"class_name": "Custom>AdamW", "config": {**KERAS_ADAM, "weight_decay": 0.25}}, 0.25),
    ],
    ids=["Adam", "AdamW", "serialized", "registered"],
)
def test_a_config_of_keras_own_adam_loads(config, decay):
    optimizer = AdamWeightDecay.from_config(config, named())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (0.125, (0.5, 0.75), 1e-8)
    assert group["weight_decay"] == decay
    assert "use_ema" not in optimizer.get_config()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**KERAS_ADAM, "use_ema": True}, "use_ema=True, which does not exist here: keep the average with"),
        ({**KERAS_ADAM, "loss_scale_factor": 8.0}, "loss_scale_factor=8.0, .*GradScaler"),
        ({**KERAS_ADAM, "gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4, .*GradientAccumulator"),
        ({**KERAS_ADAM, "weight_decay": 0.1, "weight_decay_rate": 0.2}, "weight_decay=0.1 and weight_decay_rate=0.2"),
        ({"class_name": "SGD", "config": {"learning_rate": 0.1}}, "the config is of 'SGD'"),
    ],
    ids=["average", "scale", "accumulation", "two decays", "another optimizer"],
)
def test_a_config_of_keras_that_means_something_else_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        AdamWeightDecay.from_config(config, named())


# Strings.

TEXT = "1e-4"


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, row in OPTIMIZERS.items() for option in row.numbers]
)
def test_an_option_that_is_a_string_is_refused_by_name(name, option):
    row = OPTIMIZERS[name]
    options = row.fixed_rate if option == row.rate else {}
    with pytest.raises(ValueError, match=f"{option} must be .* got '1e-4' .a string: YAML"):
        row.cls([parameter()], **options, **{option: TEXT})


@pytest.mark.parametrize(
    ("optimizer", "option", "value"),
    [(AdamW, "betas", (0.9, "0.99")), (Adafactor, "eps", (1e-30, TEXT))],
    ids=["betas", "eps"],
)
def test_a_string_in_a_pair_is_refused_by_name(optimizer, option, value):
    with pytest.raises(ValueError, match=option + r"\[1\] must be .*a string: YAML"):
        optimizer([parameter()], **{option: value})


CREATE = ["init_lr", "num_train_steps", "num_warmup_steps", "min_lr_ratio", "adam_beta1", "adam_beta2", "adam_epsilon"]
CREATE += ["adam_clipnorm", "adam_global_clipnorm", "weight_decay_rate", "power"]


@pytest.mark.parametrize("argument", CREATE)
def test_an_argument_of_create_optimizer_that_is_a_string_is_refused_by_name(argument):
    arguments = {"init_lr": 0.1, "num_train_steps": 9, "num_warmup_steps": 3, argument: TEXT}
    with pytest.raises(ValueError, match=f"{argument} must be .* got '1e-4' .a string: YAML"):
        create_optimizer(named(), **arguments)


SCHEDULES = {
    "cosine": {"num_cycles": TEXT},
    "polynomial": {"lr_end": TEXT, "power": TEXT},
    "inverse_sqrt": {"timescale": TEXT},
    "cosine_with_min_lr": {"min_lr": TEXT, "min_lr_rate": TEXT},
    "cosine_warmup_with_min_lr": {"min_lr": TEXT, "min_lr_rate": TEXT},
    "warmup_stable_decay": {"num_decay_steps": TEXT, "min_lr_ratio": TEXT, "num_stable_steps": TEXT},
    "greedy": dict.fromkeys(
        [
            "factor",
            "patience",
            "threshold",
            "cooldown",
            "warmup",
            "min_lr",
            "max_lr",
            "eps",
            "window_size",
            "reset_start",
        ],
        TEXT,
    ),
    "reduce_lr_on_plateau": dict.fromkeys(
        ["factor", "patience", "threshold", "cooldown", "min_lr", "eps"],
        TEXT,
    ),
}


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, arguments in SCHEDULES.items() for argument in arguments]
)
def test_an_argument_of_a_schedule_that_is_a_string_is_refused_by_name(name, argument):
    specific = {"num_decay_steps": 5} if name == "warmup_stable_decay" else {}
    with pytest.raises(ValueError, match=f"^{argument} must be .* got '1e-4' .a string: YAML"):
        get_scheduler(name, sgd(), 2, 20, {**specific, argument: SCHEDULES[name][argument]})


@pytest.mark.parametrize("argument", ["num_warmup_steps", "num_training_steps"])
def test_a_count_that_is_a_string_or_given_twice_is_refused_by_name(argument):
    counts = {"num_warmup_steps": 2, "num_training_steps": 20}
    with pytest.raises(ValueError, match=f"^{argument} must be a finite number, got '5'"):
        get_scheduler("linear", sgd(), **{**counts, argument: "5"})
    with pytest.raises(ValueError, match=f"has {argument}=5, an argument of get_scheduler itself"):
        get_scheduler("linear", sgd(), **counts, scheduler_specific_kwargs={argument: 5})
    with pytest.raises(ValueError, match=r"scheduler_specific_kwargs must be a dict of arguments, got '\{\}'"):
        get_scheduler("linear", sgd(), **counts, scheduler_specific_kwargs="{}")


@pytest.mark.parametrize("argument", ["initial_learning_rate", "decay_steps", "end_learning_rate", "power"])
def test_an_argument_of_a_keras_schedule_that_is_a_string_is_refused_by_name(argument):
    with pytest.raises(ValueError, match=f"{argument} must be a finite number, got '1e-4'"):
        PolynomialDecay(**{"initial_learning_rate": 0.1, "decay_steps": 5, argument: TEXT})


# Bounds, and functions that return no rate.


@pytest.mark.parametrize(
    ("name", "specific", "message"),
    [
        ("polynomial", {"lr_end": 0.2}, "lr_end must be below the initial learning rate 0.1, got 0.2"),
        ("cosine_with_min_lr", {"min_lr": 0.2}, "min_lr must not be above the initial learning rate 0.1, got 0.2"),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 2.0}, "min_lr_rate must be <= 1, got 2.0"),
        ("warmup_stable_decay", {"num_decay_steps": 5, "min_lr_ratio": 2.0}, "min_lr_ratio must be <= 1, got 2.0"),
        ("reduce_lr_on_plateau", {"min_lr": 0.2}, "min_lr must not be above the rate, got 0.2 .* lr=0.1"),
        ("greedy", {"min_lr": 0.2, "max_lr": 0.1}, "min_lr must not be above max_lr, got min_lr=0.2 and max_lr=0.1"),
    ],
)
def test_a_minimum_above_the_rate_is_refused(name, specific, message):
    with pytest.raises(ValueError, match=message):
        get_scheduler(name, sgd(), 0, 10, specific)


def test_a_minimum_at_the_rate_and_below_that_before_a_warm_up_is_taken():
    get_scheduler("cosine_with_min_lr", sgd(), 0, 10, {"min_lr": 0.1})
    optimizer = sgd()
    get_scheduler("linear", optimizer, 5, 10)
    assert optimizer.param_groups[0]["lr"] == 0.0
    ReduceLROnPlateau(optimizer, min_lr=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_minimum_at_a_rate_that_is_a_tensor_is_taken_as_its_dtype_has_it(dtype):
    """float32 has 1e-4 as 9.9999997e-5."""
    for low in (1e-4, 1e-3, 0.3):
        ReduceLROnPlateau(sgd(torch.tensor(low, dtype=dtype)), min_lr=low)
        get_scheduler("cosine_with_min_lr", sgd(torch.tensor(low, dtype=dtype)), 0, 10, {"min_lr": low})
        with pytest.raises(ValueError, match="min_lr must not be above the rate"):
            ReduceLROnPlateau(sgd(torch.tensor(low, dtype=dtype)), min_lr=1.01 * low)
        with pytest.raises(ValueError, match="min_lr must not be above the initial"):
            get_scheduler("cosine_with_min_lr", sgd(torch.tensor(low, dtype=dtype)), 0, 10, {"min_lr": 1.01 * low})


@pytest.mark.parametrize(
    "kind", [np.int64, np.float32, np.array, torch.tensor], ids=["int64", "float32", "0-d", "tensor"]
)
def test_the_state_of_a_scheduler_holds_plain_numbers_whatever_it_was_made_of(kind):
    optimizer = sgd()
    optimizer.param_groups[0]["initial_lr"] = 0.1
    schedulers = [
        get_linear_schedule_with_warmup(optimizer, kind(1), kind(9), last_epoch=kind(2)),
        get_scheduler("greedy", sgd(), scheduler_specific_kwargs={"patience": kind(1), "max_lr": kind(1)}),
        get_scheduler(
            "reduce_lr_on_plateau", sgd(), scheduler_specific_kwargs={"patience": kind(1), "min_lr": kind(0)}
        ),
        AdafactorSchedule(Adafactor([parameter()]), initial_lr=kind(1)),
    ]
    for scheduler in schedulers:
        json.dumps(scheduler.state_dict())
    assert schedulers[0].last_epoch == 3 and type(schedulers[0].last_epoch) is int


@pytest.mark.parametrize(
    "rate", [None, "0.1", True, 0.1j, [0.1], np.array([0.1, 0.2]), torch.tensor([0.1, 0.2])], ids=repr
)
def test_a_function_that_returns_no_rate_is_named_with_what_it_returned(rate):
    with pytest.raises(ValueError, match=r"learning_rate gives .* at step 0: a rate must be one real number"):
        AdamWeightDecay([parameter()], lambda n: rate)
    optimizer = AdamWeightDecay([parameter()], WarmUp(0.1, lambda n: rate, 1))
    step(optimizer)
    with pytest.raises(ValueError, match=r"decay_schedule_fn gives .* at step 0: a rate must be one real number"):
        step(optimizer)
    assert optimizer.iterations == 1


@pytest.mark.parametrize(
    "rate", [1, np.float32(0.5), np.array(0.5), np.array([0.5]), torch.tensor([0.5]), parameter(0.5)], ids=repr
)
def test_a_function_may_return_any_scalar(rate):
    optimizer = AdamWeightDecay([parameter()], lambda n: rate)
    step(optimizer)
    assert optimizer.param_groups[0]["lr"] == float(np.asarray(torch.as_tensor(rate).detach()).reshape(()))
    assert type(optimizer.param_groups[0]["lr"]) is float


@pytest.mark.parametrize("function", [lambda: 0.1, lambda n, m: 0.1], ids=["no argument", "two arguments"])
def test_a_function_that_does_not_take_the_step_alone_is_refused(function):
    with pytest.raises(ValueError, match=r"learning_rate must be a function of the step, .* with the step alone"):
        AdamWeightDecay([parameter()], function)
    with pytest.raises(ValueError, match="decay_schedule_fn must be a function of the step"):
        WarmUp(0.1, function, 3)


# The original's numbers where they are odd, recorded from transformers 5.23.

GREEDY_AFTER_NAN = [0.2, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.01, 0.01, 0.1, 0.2]

# (warm-up, decay, total, step, decay type, minimum): factor
WSD_FRACTIONS = {
    (1.7, 0.09829492033838017, 3, 3, "linear", 0.0): 0.90170507966162,
    (3, 0.13434774704657804, 5, 5, "linear", 0.1): 0.8790870276580799,
    (0.7880665846031316, 4, 20, 16, "1-sqrt", 0.1): 0.9999999810339182,
    (2.5, 3.5, 10, 7, "linear", 0.0): 0.8571428571428572,
    (2.5, 3.5, 10, 2, "linear", 0.0): 0.8,
}


def test_a_smoothed_greedy_schedule_after_a_nan_has_the_originals_rates():
    """Its running sum stays NaN, and no metric counts as better until everything starts over."""
    optimizer = sgd()
    scheduler = GreedyLR(optimizer, smooth=True, window_size=3, patience=0, factor=0.5, min_lr=0.01, reset_start=3)
    metrics = [3.0, 2.0, float("nan"), 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    rates = []
    for metric in metrics:
        scheduler.step(metric)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == GREEDY_AFTER_NAN


@pytest.mark.parametrize(("arguments", "factor"), WSD_FRACTIONS.items(), ids=str)
def test_phases_of_fractional_lengths_have_the_originals_factors(arguments, factor):
    """Rounding of their lengths decides on which side of an edge a step is."""
    warmup, decay, total, number, decay_type, minimum = arguments
    specific = {"num_decay_steps": decay, "decay_type": decay_type, "min_lr_ratio": minimum}
    scheduler = get_scheduler("warmup_stable_decay", sgd(), warmup, total, specific)
    assert scheduler.lr_lambdas[0](number) == pytest.approx(factor, rel=1e-13)
