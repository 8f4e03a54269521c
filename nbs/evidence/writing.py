"""Judges for written digits, over ten sampling seeds (five for parts) and many ways to sample: `python nbs/evidence/writing.py` in a clone.

Adds what is missing to nbs/runs/writing/judged.json and kept.json. About an hour on one idle CPU core in all; stop and go on when you like."""
import json
import time
from functools import cache
from pathlib import Path
import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from safetensors.torch import load_file
from sklearn.svm import SVC
from fastattn.all import *

here = Path(__file__).resolve().parents[1]/'runs/writing'
seeds = 10
ways = [dict(), dict(order='halton')]
more_ways = [dict(order='random'), dict(order='halton', guidance=0.5), dict(guidance=0.5), dict(remask=0.1),
    dict(steps=16), dict(steps=16, order='halton'), dict(guidance=1.), dict(order='halton', guidance=1.),
    dict(remask=0.2), dict(order='halton', remask=0.1),
    dict(top_p=0.95), dict(order='halton', top_p=0.95), dict(temperature=0.9)]
part_ways = [(0, dict()), (0, dict(remask=0.2)), (8, dict()), (8, dict(guidance=1.)), (8, dict(guidance=1., remask=0.2)), (32, dict())]

dls = get_tokens('digits')
train,y_train = dls.train_ds.tokens.long(),dls.train_ds.labels
valid,y_valid = dls.valid_ds.tokens.long(),dls.valid_ds.labels
model = NonLinearTransformer(vocab_size=17, n_labels=10, matrix_dim=8, heads=4, depth=4, iterations=1).eval()
model.load_state_dict(load_file(here/'digits.safetensors'))

def svm(x, y): return SVC(gamma=0.001, C=10).fit(x.flatten(1), y)
def nearest(x): return torch.cdist(x.flatten(1).float(), train.flatten(1).float()).amin(1).median().item()
def gen(seed): return torch.Generator().manual_seed(seed)
def by_class(right, y): return [round(right[y==k].float().mean().item(), 4) for k in range(10)]

judge = svm(train, y_train)
def named(x): return torch.as_tensor(judge.predict(x.flatten(1)))

def written(how, seed):
    "1400 written digits: their judges' row"
    y,start = torch.arange(1400)%10,time.process_time()
    x = model.generate((1400,8,8), label=y, generator=gen(seed), **how)
    took = time.process_time()-start
    real = torch.as_tensor(svm(x, y).predict(valid.flatten(1)))==y_valid
    right = named(x)==y
    return dict(how=how, seed=seed, named=right.float().mean().item(), taught=real.float().mean().item(), nearest=nearest(x),
        cpu_s=round(took, 1), named_by_class=by_class(right, y), taught_by_class=by_class(real, y_valid))

def left(x): return torch.where(torch.arange(8)<4, x, -1)
def outline(x): return torch.where((F.max_pool2d((x>0).float(), 3, 1, 1)>0)&(x==0), x, -1)
def fourth(x): return torch.where((torch.arange(8)[:,None]%2==0)&(torch.arange(8)%2==0), x, -1)
parts = dict(left=left, outline=outline, fourth=fourth)

@cache
def read(part, rounds, seed): return model.classify(parts[part](valid), rounds, generator=gen(seed)).argmax(-1)

def completed(part, rounds, how, seed):
    "All held-out digits, completed from a part: which keep their class? 0 `rounds` tell no class"
    prompt = parts[part](valid)
    label = read(part, rounds, seed) if rounds else None
    right = named(model.generate(prompt, label=label, generator=gen(seed), **how))==y_valid
    known = (label==y_valid).float().mean().item() if rounds else None
    return dict(part=part, rounds=rounds, how=how, seed=seed, kept=right.float().mean().item(), read=known)

def fill(name, wanted, fn):
    "Rows of the file `name` for all that are `wanted`"
    path = here/name
    rows = json.loads(path.read_text()) if path.exists() else []
    done = [{k: o[k] for k in wanted[0]} for o in rows]
    for o in wanted:
        if o in done: continue
        rows.append(fn(**o))
        write_atomic(path, json.dumps(rows))
        print({k: v for k,v in rows[-1].items() if not k.endswith('by_class')}, flush=True)

@call_parse
def main():
    "Judge what is written, and what becomes of parts"
    fill('judged.json', [dict(how=h, seed=s) for o in (ways,more_ways) for s in range(seeds) for h in o], written)
    fill('kept.json', [dict(part=p, rounds=r, how=h, seed=s) for s in range(seeds//2) for p in parts for r,h in part_ways
        if r<=8 or p=='left'], completed)
