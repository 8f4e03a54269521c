"Tests and measures fastattn on this machine's GPU, or CPU, step by step: call `python nbs/gpu/run.py` again until nothing is left"
import json,signal,subprocess,sys,time,torch
from pathlib import Path
from typing import Annotated
from fastcore.script import call_parse
from fastattn.bench import benches
from fastattn.core import check_name,write_atomic
from fastattn.recipes.options import presets

home = Path(__file__).resolve().parents[2]
train_code = 'import sys; from fastattn.recipes.train import main; sys.exit(main())'
bench_code = 'import json,sys; from fastattn.bench import bench; bench(**json.loads(sys.argv[1]))'

def test_words(name): return ['-m', 'pytest', '-m', 'device', '-q', '-p', 'no:cacheprovider', str(home/'tests'/f'test_{name}.py')]
def bench_words(out, dtype, **words): return ['-c', bench_code, json.dumps(dict(words, dtype=dtype, out=str(out/'bench'/dtype)))]
def train_words(out, words): return ['-c', train_code, *words.split(), '--out', str(out/'runs')]

def steps_of(
    device:str, # 'cpu' or 'cuda'
    out:Path, # Folder of the results
    toy:bool=False # Small enough for a try?
)->dict: # Name -> arguments for Python
    "What there is to do, in the order of its worth"
    dtypes = ['fp32','tf32','bf16'] if device=='cuda' else ['fp32','bf16']
    tests = {f'test-{o}': test_words(o) for o in ('device','kernels','bench')}
    bench = {f'bench-{o}-{d}': bench_words(out, d, what=o, device=device, quick=toy) for d in dtypes for o in benches}
    if toy:
        return {**tests, **bench, 'imagenette': train_words(out, 'digits --size 8 --epochs 1 --widen 0.0625 --attn none ssa ssa_sym --runs 2'),
            'thesis-2d': train_words(out, 'digits --preset thesis-2d --size 6 --epochs 1 --dim 8 --depth 1 --heads 2 --runs 1')}
    nette = train_words(out, 'imagenette --board 128/5 --arch xresnet50 --attn none ssa ssa_sym --precision bf16 --channels-last --compile --runs 10')
    tables = ['thesis-2d','thesis-1d',*[o for o in presets if not o.startswith('thesis')]]
    return {**tests, **bench, 'imagenette': nette, **{o: train_words(out, f'--preset {o}') for o in tables}}

def do(
    words:list, # Arguments for Python
    log, # File that gets what it says
    seconds:float # After these it is interrupted
)->str: # 'done', 'failed', or 'begun': interrupted
    "Run Python; what is interrupted has what Ctrl-C gives it, a minute to end"
    with open(log, 'ab') as f: process = subprocess.Popen([sys.executable, *words], stdout=f, stderr=subprocess.STDOUT, cwd=home)
    try: return 'failed' if process.wait(seconds) else 'done'
    except subprocess.TimeoutExpired: return 'begun'
    finally:
        if process.poll() is None: process.send_signal(signal.SIGINT)
        try: process.wait(60)
        except subprocess.TimeoutExpired: process.kill()

def last_line(log):
    lines = Path(log).read_text(encoding='utf-8', errors='replace').strip().splitlines()
    return lines[-1] if lines else ''

def read_states(out):
    try: return json.loads((Path(out)/'steps').read_text(encoding='utf-8'))
    except FileNotFoundError: return {}

@call_parse(pos=['what'])
def run(
    what:Annotated[str, {'nargs':'*'}]=None, # Names of steps (default: all)
    device:str=None, # cuda or cpu (default: cuda if there is one)
    minutes:float=9., # How long this call may take; the next one goes on
    again:bool=False, # Also what is done, or has failed
    toy:bool=False, # Small sizes, for a try
    out:str=None # Folder of the results (default: nbs/runs/gpu, which the page reads)
)->dict: # State of each step
    "Do what is not done yet of tests, benchmarks and trainings"
    end = time.time()+60*minutes
    device = check_name(device or ('cuda' if torch.cuda.is_available() else 'cpu'), ['cpu','cuda'], 'device')
    out = Path(out or home/'nbs'/'runs'/'gpu').resolve()
    steps,states = steps_of(device, out, toy),read_states(out)
    names = [check_name(o, steps, 'step') for o in ([what] if isinstance(what, str) else what or steps)]
    (out/'logs').mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if device=='cuda' else f'cpu, {torch.get_num_threads()} threads'
    for name in names:
        state = states.get(name, dict(state='', seconds=0.))
        if state['state'] in ('done','failed') and not again: continue
        left = end-time.time()
        if left<min(60., 30*minutes): break # less than a start takes
        began,log = time.time(),out/'logs'/f'{name}.txt'
        outcome = do(steps[name], log, left)
        states[name] = dict(state=outcome, seconds=round(state['seconds']+time.time()-began, 1), said=last_line(log), machine=machine, torch=torch.__version__)
        write_atomic(out/'steps', json.dumps(states, indent=1)+'\n')
        print(f"{name}: {outcome} after {states[name]['seconds']:.0f} s. {states[name]['said']}", flush=True)
    left = [o for o in names if states.get(o, {}).get('state') not in ('done','failed')]
    print(f"{len(left)} of {len(names)} steps are left{': '+', '.join(left[:5])+', ...'*(len(left)>5) if left else ''}")
    return states
