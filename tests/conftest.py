"""One thread for each process that tests in parallel, and for what it starts: more than there are cores make each other wait.
Stands here to be read before torch is"""
import os
workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
if workers>1: os.environ.setdefault('OMP_NUM_THREADS', str(max(1, os.cpu_count()//workers)))
