"""The helper smelt/rank/_verb.py: the family's module can be called, in a process of its own."""

import subprocess
import sys


def test_the_module_is_called_as_the_verb_and_its_files_are_still_there():
    script = """
import smelt
assert callable(smelt.rank)
from smelt.rank.bm25 import BM25
found = smelt.rank(None, "b", ["a", "b b", "c"], BM25())
assert found[0].text == "b b", found
import smelt.rank.bm25 as module
assert module.BM25 is BM25 and smelt.rank.Judge
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
