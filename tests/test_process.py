"""What makes training fast beside the arithmetic: batches made one ahead, and memory that is kept."""

import platform
import subprocess
import sys
import threading

import pytest

from mlrpl.data import Ahead

FAULTS = """
import resource
import torch
from mlrpl import process

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(20_000_000).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
process.tune(torch.device("cpu"))
faults()
print(before, faults())
"""


def test_the_next_value_is_made_in_a_thread_while_this_one_is_used():
    seen = {}
    started = threading.Event()

    def make(k):
        seen[k] = threading.current_thread()
        if k == 2:
            started.set()
        return k * k

    ahead = Ahead(make)
    assert ahead(1) == 1
    assert started.wait(60)  # though nobody has asked for 2 yet
    assert ahead(2) == 4
    assert ahead(9) == 81  # after a resume elsewhere
    assert ahead(10) == 100
    assert seen[1] is seen[9] is threading.current_thread()
    assert seen[2] is seen[10] is not threading.current_thread()


def test_several_values_are_made_ahead_in_threads_of_their_own_and_none_twice():
    made, all_at_work = [], threading.Barrier(3)

    def make(k):
        made.append(k)
        if k in (5, 7, 9):
            all_at_work.wait(60)  # each needs the two others at work
        return -k

    ahead = Ahead(make, depth=3, stride=2)
    assert [ahead(k) for k in (3, 5, 7)] == [-3, -5, -7]
    ahead.threads.shutdown()
    assert sorted(made) == [3, 5, 7, 9, 11, 13]


def test_an_error_is_raised_where_the_value_is_asked_for():
    def make(k):
        if k == 2:
            raise ValueError("no second batch")
        return k

    ahead = Ahead(make)
    assert ahead(1) == 1
    with pytest.raises(ValueError, match="no second batch"):
        ahead(2)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_not_faulted_in_again():
    result = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    assert before > 100_000  # 10 times 80 MB in pages of 4 kB
    assert after < before / 10


def test_notebooks_are_checked_without_compiling_a_grammar_at_every_start():
    script = (
        "import sys; from mlrpl.process import import_jsonschema; import_jsonschema(); import nbformat\n"
        "from nbformat.v4 import new_code_cell, new_notebook\n"
        "nbformat.validate(new_notebook(cells=[new_code_cell('1')]))\n"
        "assert 'jsonschema' in sys.modules\n"
        "assert 'rfc3987_syntax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
