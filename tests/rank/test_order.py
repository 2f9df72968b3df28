"""The helper smelt/rank/_order.py; what it refuses is a law of the family (test_laws.py)."""

import numpy

from smelt.rank import Judge
from smelt.rank._order import ask


class Fixed(Judge):
    def __call__(self, query, passages, model):
        return [numpy.int64(1), numpy.int64(0), 2]


def test_numbers_of_any_integer_type_become_ints():
    order = ask(Fixed(), "q", ["a", "b", "c"], None)
    assert order == [1, 0, 2] and all(type(i) is int for i in order)
