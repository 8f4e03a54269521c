"What holds for all tests: threads, and which are slow"
import os
from pathlib import Path
import pytest

# One thread for each process that tests in parallel, and for what it starts: more than there are cores make each other wait.
# Stands here to be read before torch is
workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
if workers>1: os.environ.setdefault('OMP_NUM_THREADS', str(max(1, os.cpu_count()//workers)))

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Tests of the site are slow where it is to be built first"
    if (Path(__file__).parents[1]/'_docs'/'html').exists(): return
    for o in items:
        if 'site' in getattr(o, 'fixturenames', ()): o.add_marker('slow')
