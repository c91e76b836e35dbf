"""Jobs side by side: order, errors, settings of the threads, and sums that always round alike."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from llmshrink.engine.lanes import LANES, Turns, lanes_of, side_by_side

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_jobs_that_ran_together() -> None:
    together = threading.Barrier(LANES, timeout=10)

    def job(number: int) -> int:
        together.wait()  # passes only if as many jobs run at a time
        time.sleep(0.01 * (number % 2 == 0))
        return number

    assert list(side_by_side(CPU, job, 8)) == list(range(8))


def test_each_lane_has_its_share_of_the_threads_and_no_gradients() -> None:
    found = list(side_by_side(CPU, lambda _: (torch.get_num_threads(), torch.is_grad_enabled()), 6))
    assert set(found) == {(4 // LANES, False)}
    assert torch.get_num_threads() == 4 and torch.is_grad_enabled()
    began: list[int] = []
    later = threading.Thread(target=lambda: began.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert began == [4]


def test_one_thread_or_a_gpu_has_one_lane() -> None:
    assert lanes_of(CPU) == LANES
    assert lanes_of(torch.device("cuda")) == 1
    torch.set_num_threads(1)
    assert lanes_of(CPU) == 1
    here = threading.get_ident()
    found = list(side_by_side(CPU, lambda n: (n, threading.get_ident(), torch.is_grad_enabled()), 3))
    assert found == [(0, here, False), (1, here, False), (2, here, False)]


def test_an_error_ends_the_rest() -> None:
    ran: list[int] = []

    def job(number: int) -> None:
        ran.append(number)
        if number == 2:
            raise ValueError("two")
        time.sleep(0.02)

    with pytest.raises(ValueError, match="two"):
        list(side_by_side(CPU, job, 100))
    assert len(ran) < 20
    assert torch.get_num_threads() == 4


def test_sums_take_their_terms_in_order_also_where_some_have_none() -> None:
    jobs, order = 30, {key: list[int]() for key in "ab"}
    turns = Turns(jobs)

    def job(number: int) -> None:
        pause = random.Random(number)
        with turns.taking_part(number):
            for key in "ab":
                time.sleep(pause.random() * 0.004)
                if key == "b" and number % 3 == 0:  # as an expert that no token of this batch reached
                    continue
                with turns.turn(number, key):
                    order[key].append(number)

    list(side_by_side(CPU, job, jobs))
    assert order["a"] == list(range(jobs))
    assert order["b"] == [n for n in range(jobs) if n % 3]


def test_nobody_waits_for_a_job_that_failed() -> None:
    turns = Turns(4)

    def job(number: int) -> None:
        with turns.taking_part(number):
            if number == 0:
                time.sleep(0.02)
                raise ValueError("before its turn")
            with turns.turn(number, "sum"):
                pass

    with pytest.raises(ValueError, match="before its turn"):
        list(side_by_side(CPU, job, 4))
