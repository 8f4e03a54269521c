"Commands as a terminal runs them, and processes in which tests run code"
import itertools,multiprocessing,os,sys
from pathlib import Path
from types import SimpleNamespace

def command(name, pos='data'):
    "Code for `python -c` that runs `fastattn-{name}`; `pos` is the positional argument of the leaderboard's"
    if name=='train': return "import sys; from fastattn.recipes.train import main; sys.exit(main())"
    return f"import sys; from fastattn.recipes.{name} import {name}; from fastcore.script import _run_cli; sys.argv[0]='fastattn-{name}'; sys.exit(_run_cli({name}.__wrapped__, False, ['{pos}']))"

# Importing torch and fastai takes seconds: these processes are forks of one that has done so.
# It has not imported fastattn: a notebook defines what its module defines, and an operator of torch can be defined but once
forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload(['fastai.vision.all', 'timm', 'scipy.stats', 'nbdev.test'])

def send_output(out, err):
    "From here on, what this process prints is added to files"
    for stream,path in ((sys.stdout,out),(sys.stderr,err)):
        stream.flush()
        fd = os.open(path, os.O_WRONLY|os.O_CREAT|os.O_APPEND)
        os.dup2(fd, stream.fileno())
        os.close(fd)
        stream.reconfigure(line_buffering=True)

def _run_code(code, args, out, err, cwd, env):
    send_output(out, err)
    os.chdir(cwd)
    os.environ.update(env)
    import torch
    torch.set_num_threads(1)
    sys.argv = ['-c',*args]
    exec(code, {'__name__': '__main__'})

numbers = itertools.count()

class Forked:
    "A process that runs `code` as `python -c code *args` does, with one thread; what it prints goes to files in `folder`"
    def __init__(self, folder, code, *args, cwd='.', **env):
        folder.mkdir(parents=True, exist_ok=True)
        n = next(numbers)
        self.files = [folder/f'{n}.{o}' for o in ('out','err')]
        for f in self.files: f.touch()
        self.process = forks.Process(target=_run_code, args=(code, list(map(str, args)), *self.files, Path(cwd).absolute(), env), daemon=True)
        self.process.start()
        self.kill,self.pid = self.process.kill,self.process.pid

    @property
    def running(self): return self.process.is_alive()
    def send_signal(self, signal): os.kill(self.pid, signal)

    def end(self):
        "Wait for it: its `returncode`, `stdout` and `stderr`"
        self.process.join()
        return SimpleNamespace(returncode=self.process.exitcode, stdout=self.stdout, stderr=self.stderr)

    @property
    def stdout(self): return self.files[0].read_text()
    @property
    def stderr(self): return self.files[1].read_text()
