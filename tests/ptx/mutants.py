"""How many spoilt instructions the tests notice: `make mutants`.

The cases of `ptx.cases` run as in `test_steps`, and some launches of every kernel are kept. Of all instructions that
they carry out, a sample is spoilt, one at a time (`spoiling`), and the launches that carry it out are run again until
one is noticed, by what the tests look at: numbers that are not those of Triton's interpreter, findings of the machine,
a kernel that does not come to an end. That is less than the tests see, which run all launches, and compare with eager
steps as well.

A spoilt kernel that passes is equivalent if it leaves the same bits everywhere, in all these launches and in those of
random larger cases; else it survived. Instructions whose results nobody reads (`spoiling.dead`) are not spoilt.
"""

import argparse
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from tqdm import tqdm

from ptx.agreement import disagreement
from ptx.cases import CASES
from ptx.gpu import listing_of
from ptx.machine import Schedule, StuckError
from ptx.reader import Instruction, UnknownInstructionError
from ptx.replays import Kept, Launches, larger
from ptx.spoiling import Spoilt, dead, spoilt, with_statement
from ptx.translator import Kernel, translate

SECONDS = 120
"""Of the processor, that a trial may take; it is noticed then, as a kernel that does not end."""

NUMBERS, FINDINGS, STUCK, SURVIVED, EQUIVALENT, FAILED = HOW = (
    *("numbers", "findings", "stuck", "survived", "equivalent"),
    "failed",
)


class Site(NamedTuple):
    """A statement of a kernel that was carried out."""

    kernel: str
    text: str
    at: int

    @property
    def instruction(self) -> Instruction:
        statement = listing_of(self.text).statements[self.at]
        assert isinstance(statement, Instruction)
        return statement

    @property
    def kind(self) -> str:
        """Of the instruction: its first word, with the memory that it reaches."""
        return ".".join(self.instruction.opcode.split(".")[: 2 if self.instruction.opcode[:3] in ("ld.", "st.") else 1])


class Trial(NamedTuple):
    """A spoilt instruction."""

    site: Site
    way: str
    statement: Spoilt
    kernel: Kernel

    def __str__(self) -> str:
        new = "nothing" if self.statement is None else self.statement
        i = self.site.instruction
        return f"{self.site.kernel}: {self.way}: {i} -> {new} at {i.where}"


def sample(sites: Sequence[Site], random: Random, number: int) -> list[Site]:
    """Returns one site of every kernel, one of every kind of instruction, and then any."""
    left = sorted(sites)
    random.shuffle(left)
    first = {("kernel", s.kernel): s for s in left} | {("kind", s.kind): s for s in left}
    chosen = list(dict.fromkeys([*first.values(), *left]))
    return chosen[: max(number, len(set(first.values())))]


def trial_of(site: Site, random: Random) -> Trial | None:
    """Spoils a site in one of the ways that there are; None if there is none."""
    listing = listing_of(site.text)
    ways = spoilt(listing, site.at, random)
    random.shuffle(ways)
    for way, statement in ways:
        try:
            return Trial(site, way, statement, translate(with_statement(listing, site.at, statement)))
        except UnknownInstructionError:  # not everything that can be spoilt is an instruction then
            continue
    return None


def try_out(kernel: Kernel, launches: Iterable[Kept]) -> str:
    """Returns how a spoilt kernel is noticed by the first of these launches that does."""
    same = True
    for kept in launches:
        try:
            run = kept.replay.run(kernel, Schedule(watched=kept.watched))
        except StuckError:
            return STUCK
        if run.findings.counts:
            return FINDINGS
        if disagreement(kept.replay.launch, run.journal):
            return NUMBERS
        written = run.journal.written()
        same = same and all(map(np.array_equal, written, kept.replay.after))
    return EQUIVALENT if same else SURVIVED


def in_children(works: Sequence[Callable[[], str]], jobs: int) -> Iterator[tuple[int, str]]:
    """Yields the numbers of works and what they return, one of `HOW`, each in a process of its own.

    Raises:
        RuntimeError: a work raised an error.
    """
    running: dict[int, int] = {}
    waiting = list(enumerate(works))[::-1]
    while waiting or running:
        while waiting and len(running) < jobs:
            number, work = waiting.pop()
            if child := os.fork():
                running[child] = number
                continue
            how = FAILED
            try:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                how = work()
            finally:
                os._exit(HOW.index(how))
        child, status = os.wait()
        how = HOW[os.WEXITSTATUS(status)] if os.WIFEXITED(status) else STUCK
        if how == FAILED:
            raise RuntimeError(f"trial {running[child]} failed")
        yield running.pop(child), how


def report(done: Sequence[tuple[Trial, str]], executed: int, dead: int) -> None:
    """Prints a table by kernel, and the ones that were not noticed."""
    counts = Counter((name, how) for trial, how in done for name in (trial.site.kernel, "all"))
    print(f"\n{executed} instructions carried out, and {dead} whose results nobody reads; {len(done)} spoilt\n")
    print(f"{'kernel':24} {'spoilt':>7} " + " ".join(f"{how:>10}" for how in HOW[:-1]) + "    noticed  of the rest")
    for name in [*sorted({name for name, _ in counts} - {"all"}), "all"]:
        row = {how: counts[name, how] for how in HOW[:-1]}
        noticed, every = row[NUMBERS] + row[FINDINGS] + row[STUCK], sum(row.values())
        shares = f"{noticed / every:11.1%} {noticed / max(1, every - row[EQUIVALENT]):12.1%}"
        print(f"{name:24} {every:7} " + " ".join(f"{n:10}" for n in row.values()) + shares)
    print("\nEquivalent: the same bits in all launches that were kept, and in those of random larger cases.\n")
    for how in (SURVIVED, EQUIVALENT):
        print("\n".join(f"{how}: {trial}" for trial, found in done if found == how))


def main() -> None:
    parser = argparse.ArgumentParser(description="How many spoilt instructions the tests notice.")
    parser.add_argument("--number", type=int, default=300, help="how many instructions to spoil (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once (default: one per core)")
    parser.add_argument("--larger", type=int, default=12, help="random larger cases at most (default: 12)")
    parser.add_argument("-k", default="", metavar="WORD", help="only cases with this word (default: all)")
    given = parser.parse_args()
    print(f"seed {given.seed}")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    launches, cases_of = Launches(), dict[str, str]()
    for name in tqdm([name for name in CASES if given.k in name], "as they are"):
        known = set(launches.names)
        launches.run(CASES[name])
        cases_of |= {text: name for text in set(launches.names) - known}
    deads = {text: dead(listing_of(text)) for text in launches.names}
    sites = [Site(kernel, text, at) for text, kernel in launches.names.items() for at in launches.executed(text)]
    alive = [site for site in sites if site.at not in deads[site.text]]
    random = Random(given.seed)
    trials = [t for site in sample(alive, random, given.number) if (t := trial_of(site, random))]
    done: dict[int, str] = {}

    def try_all(numbers: Sequence[int], among: Launches, what: str) -> None:
        works = [
            lambda n=n: try_out(trials[n].kernel, among.of(trials[n].site.text, trials[n].site.at)) for n in numbers
        ]
        for k, how in tqdm(in_children(works, given.jobs), what, len(works)):
            done[numbers[k]] = how
            if how == SURVIVED:
                tqdm.write(f"{how}: {trials[numbers[k]]}")

    try_all(range(len(trials)), launches, "spoilt")
    unseen = [n for n, how in done.items() if how == EQUIVALENT]
    texts = {trials[n].site.text for n in unseen}
    others = Launches()
    names = sorted({cases_of[text] for text in texts})
    for name in tqdm(random.sample(names, min(given.larger, len(names))), "larger"):
        if (case := larger(name, random)) is not None:
            others.run(case, texts)
    try_all(unseen, others, "spoilt, larger")
    for n in unseen:
        if done[n] in (NUMBERS, FINDINGS, STUCK):
            done[n] = SURVIVED  # the tests have no such case
    report([(trials[n], done[n]) for n in sorted(done)], len(alive), len(sites) - len(alive))


if __name__ == "__main__":
    main()
