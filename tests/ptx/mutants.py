"""How many spoilt instructions the tests notice: `make mutants`.

Of all instructions that the cases of `ptx.cases` carry out, a sample is spoilt, one at a time (`spoiling`), and the
cases that run it are run again, the cheapest first, until one fails: its numbers differ from the eager ones, the
machine finds something, or the kernel does not come to an end. Each trial is a process of its own, since a spoilt
address may hit memory of the trial itself.
"""

import argparse
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tqdm import tqdm

from ptx.cases import CASES
from ptx.gpu import FindingsError, listing_of, standing_in
from ptx.machine import Schedule, StuckError
from ptx.reader import Block, UnknownInstructionError
from ptx.spoiling import Spoilt, is_dead, spoilt, with_statement
from ptx.translator import Kernel, translate
from ptx.workloads import Outcome, assert_agree

SECONDS = 600
"""That a trial may take; it is noticed then, as a kernel that does not end."""

SURVIVED = "survived"
HOW = ("numbers", "findings", "stuck", SURVIVED)


class Site(NamedTuple):
    """A statement of a kernel that was carried out."""

    text: str
    at: int

    @property
    def instruction(self) -> Any:
        return listing_of(self.text).statements[self.at]


class Baseline(NamedTuple):
    """A case as it should be.

    Attributes:
        expected: of the eager backend.
        seconds: that it takes.
        executed: by kernel, indices of statements that it carries out.
    """

    expected: Outcome
    seconds: float
    executed: dict[str, set[int]]


class Trial(NamedTuple):
    """One spoilt instruction, and how it was noticed."""

    site: Site
    way: str
    statement: Spoilt
    how: str

    def __str__(self) -> str:
        new = "nothing" if self.statement is None else self.statement
        i = self.site.instruction
        return f"{listing_of(self.site.text).name}: {self.way}: {i} -> {new} at {i.where}"


def baseline(name: str) -> Baseline:
    """Runs a case as it should run."""
    expected = CASES[name].run("eager")
    began = time.perf_counter()
    with standing_in(Schedule(watched=CASES[name].watched)) as gpu:
        outcome = CASES[name].run("triton")
    assert_agree(outcome, expected, CASES[name].parameters)
    executed = {text: _statements(text, numbers) for text, numbers in gpu.executed.items()}
    return Baseline(expected, time.perf_counter() - began, executed)


def _statements(text: str, executed: set[int]) -> set[int]:
    """Indices of statements, of what `machine.Run.executed` has."""
    listing = listing_of(text)
    kernel = translate(listing)
    place = {id(s): k for k, s in enumerate(listing.statements)}
    done = {place[id(kernel.numbered[-1 - number])] for number in executed if number < 0}
    for number in executed:
        if number >= 0:
            block: Block = kernel.blocks[number]
            body = [i for i in block.body if i.guard is None or not i.opcode.startswith(("ld.", "st."))]
            done |= {place[id(i)] for i in (*body, *([block.last] if block.last else []))}
    return done


def try_out(kernel: Kernel, text: str, names: Sequence[str], baselines: dict[str, Baseline]) -> str:
    """Returns how a spoilt kernel is noticed by the first of these cases that does."""
    for name in names:
        try:
            with standing_in(Schedule(watched=CASES[name].watched), {text: kernel}):
                outcome = CASES[name].run("triton")
            assert_agree(outcome, baselines[name].expected, CASES[name].parameters)
        except FindingsError:
            return "findings"
        except (StuckError, RuntimeError, IndexError):
            return "stuck"
        except AssertionError:
            return "numbers"
    return SURVIVED


def in_a_child(work: Any) -> str:
    """Returns what `work()` returns, one of `HOW`, called in a forked process."""
    child = os.fork()
    if child == 0:
        how = "stuck"
        try:
            signal.alarm(SECONDS)
            how = work()
        finally:
            os._exit(HOW.index(how))
    status = os.waitpid(child, 0)[1]
    return HOW[os.WEXITSTATUS(status)] if os.WIFEXITED(status) else "stuck"


def trials(sites: Sequence[Site], baselines: dict[str, Baseline], random: Random, most: int) -> Iterator[Trial]:
    """Spoils these sites, each in one way."""
    for site in sites:
        listing = listing_of(site.text)
        ways = spoilt(listing, site.at, random)
        random.shuffle(ways)
        for way, statement in ways:
            try:
                kernel = translate(with_statement(listing, site.at, statement))
            except UnknownInstructionError:  # not everything that can be spoilt is an instruction then
                continue
            names = [n for n, b in baselines.items() if site.at in b.executed.get(site.text, ())]
            names.sort(key=lambda n: baselines[n].seconds)
            work = (kernel, site.text, names[:most], baselines)
            yield Trial(site, way, statement, in_a_child(lambda work=work: try_out(*work)))
            break


def report(done: Sequence[Trial], executed: int, dead: int) -> None:
    """Prints a table by kernel."""
    counts = Counter((listing_of(trial.site.text).name, trial.how) for trial in done)
    counts += Counter(("all", trial.how) for trial in done)
    print(f"\n{executed} executed instructions, and {dead} whose results are overwritten unread; {len(done)} spoilt\n")
    print(f"{'kernel':20} {'spoilt':>7} " + " ".join(f"{how:>9}" for how in HOW) + f" {'noticed':>9}")
    for name in [*sorted({name for name, _ in counts} - {"all"}), "all"]:
        row = [counts[name, how] for how in HOW]
        share = 1 - counts[name, SURVIVED] / max(1, sum(row))
        print(f"{name:20} {sum(row):7} " + " ".join(f"{n:9}" for n in row) + f" {share:9.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description="How many spoilt instructions the tests notice.")
    parser.add_argument("--number", type=int, default=300, help="how many instructions to spoil (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--most", type=int, default=12, help="that a spoilt kernel runs at most (default: 12 cases)")
    parser.add_argument("--minutes", type=float, default=60.0, help="to stop after (default: 60)")
    parser.add_argument("-k", default="", metavar="WORD", help="only cases with this word (default: all)")
    given = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    names = [name for name in CASES if given.k in name]
    baselines = {name: baseline(name) for name in tqdm(names, "as they are")}
    executed = {Site(text, at) for b in baselines.values() for text, done in b.executed.items() for at in done}
    dead = {site for site in executed if is_dead(listing_of(site.text), site.at)}
    random = Random(given.seed)
    alive = sorted(executed - dead)
    sites = random.sample(alive, min(given.number, len(alive)))
    done: list[Trial] = []
    end = time.monotonic() + 60 * given.minutes
    for trial in tqdm(trials(sites, baselines, random, given.most), "spoilt", len(sites)):
        done.append(trial)
        if trial.how == SURVIVED:
            tqdm.write(f"survived: {trial}")
        if time.monotonic() > end:
            break
    report(done, len(executed - dead), len(dead))


if __name__ == "__main__":
    main()
