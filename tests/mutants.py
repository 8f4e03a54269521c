"""Would the tests see a fault? Changes one place in each of some functions, runs the tests that call it, and tells which changes no test saw.

    python tests/mutants.py map               # runs the tests once and writes which functions each calls, and how long it takes
    python tests/mutants.py run -n 40         # the same 40 mutants for the same source and --seed

A mutant is a copy of the package in a temporary folder. Its tests run in a fork, the quick ones first, up to the first that fails; a mutant that no test kills within
--budget seconds of tests survives. Not collected by pytest: it takes an hour on two cores"""
import argparse,ast,json,os,random,shutil,sys,tempfile,time
from collections import defaultdict
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from commands import forks,send_output

root = Path(__file__).resolve().parents[1]
skipped = ('all.py','_modidx.py','__init__.py')

# What may be changed: a node of the syntax tree, and what stands there instead

opposite = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}

def changes(node):
    "Expressions that may stand in the place of `node`"
    def other(**kwargs): return type(node)(**{**{k: getattr(node, k) for k in node._fields}, **kwargs})
    if isinstance(node, ast.Compare) and len(node.ops)==1: yield other(ops=[opposite[type(node.ops[0])]()])
    if isinstance(node, (ast.BinOp,ast.BoolOp)) and type(node.op) in opposite: yield other(op=opposite[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not,ast.USub)): yield node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool): yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int,float)): yield ast.Constant(node.value+1)
    if isinstance(node, ast.IfExp): yield other(test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Call) and node.keywords: yield other(keywords=node.keywords[:-1])
    elif isinstance(node, ast.Call) and len(node.args)>1: yield other(args=node.args[:-1])

def places(function):
    "Nodes of the body of `function` that may be changed, with what may stand there: no docstrings, no messages, no inner functions"
    def walk(node):
        if isinstance(node, (ast.Raise,ast.JoinedStr,ast.FunctionDef,ast.Lambda)): return
        if isinstance(node, (ast.If,ast.While)): yield node.test,ast.UnaryOp(ast.Not(), node.test)
        if isinstance(node, ast.Return) and node.value is not None: yield node.value,ast.Constant(None)
        if isinstance(node, ast.expr): yield from ((node,o) for o in changes(node))
        for o in ast.iter_child_nodes(node): yield from walk(o)
    for o in function.body: yield from walk(o)

def functions(package):
    "(file, name, line, places) of all functions"
    for f in sorted(package.rglob('*.py')):
        if f.name in skipped: continue
        for o in ast.walk(ast.parse(f.read_text())):
            if isinstance(o, ast.FunctionDef) and (found := list(places(o))): yield f.relative_to(package).as_posix(),o.name,min([o.lineno, *(d.lineno for d in o.decorator_list)]),found

def replaced(source, node, new):
    "`source` with `new` in the place of `node`"
    lines = source.encode().splitlines(keepends=True)
    start,end = (sum(map(len, lines[:line-1]))+column for line,column in ((node.lineno,node.col_offset),(node.end_lineno,node.end_col_offset)))
    joined = b''.join(lines)
    return (joined[:start]+f'({ast.unparse(new)})'.encode()+joined[end:]).decode()

def mutants(package, n, seed, wanted):
    "`n` changes in as many functions, the modules in turns"
    rng,by_file = random.Random(seed),defaultdict(list)
    for o in functions(package): by_file[o[0]].append(o)
    for o in by_file.values(): rng.shuffle(o)
    turns = [o[i] for i in range(max(map(len, by_file.values()))) for o in by_file.values() if i<len(o)]
    for file,name,line,found in [o for o in turns if o[0].startswith(wanted)][:n]:
        node,new = rng.choice(found)
        yield dict(file=file, function=name, first=line, line=node.lineno, old=ast.unparse(node), new=ast.unparse(new)),replaced((package/file).read_text(), node, new)

# Running tests in forks

class Calls:
    "A plugin of pytest: for each test the functions of the package that it calls, its seconds of CPU and if it passed"
    def __init__(self, package): self.package,self.tests = str(package)+os.sep,{}
    def pytest_runtest_logreport(self, report):
        if report.when=='call': self.tests[report.nodeid]['passed'] = report.passed

    def pytest_runtest_protocol(self, item, nextitem):
        seen,start = set(),time.process_time()
        def watch(frame, event, arg):
            if event=='call': seen.add(frame.f_code)
        self.tests[item.nodeid] = {}
        sys.setprofile(watch)
        from _pytest.runner import runtestprotocol
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        runtestprotocol(item, nextitem=nextitem)
        sys.setprofile(None)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        calls = sorted({f'{o.co_filename.removeprefix(self.package)}:{o.co_firstlineno}' for o in seen if o.co_filename.startswith(self.package)})
        self.tests[item.nodeid] |= dict(calls=calls, seconds=time.process_time()-start)
        return True

def run_pytest(folder, args, log, calls=None):
    "In a fork: the tests of `folder`, with its package. Its exit code is pytest's"
    import pytest
    send_output(log, log)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(o for o in sys.path if Path(o).resolve()!=root)]
    os.environ |= dict(PYTHONPATH=str(folder), OMP_NUM_THREADS='1')
    import fastattn,torch
    torch.set_num_threads(1)
    assert Path(fastattn.__file__).is_relative_to(folder), fastattn.__file__
    plugin = Calls(folder/'fastattn')
    code = pytest.main(['-q','-p','no:cacheprovider','-p','no:xdist','-o','addopts=','--tb=short', *args], plugins=[plugin] if calls else [])
    if calls: calls.write_text(json.dumps(plugin.tests))
    sys.exit(int(code))

def in_fork(*args, limit=None):
    "Exit code, None where the time is up"
    p = forks.Process(target=run_pytest, args=args)
    p.start()
    p.join(limit)
    if p.exitcode is not None: return p.exitcode
    p.kill()
    p.join()

def copied(folder, tests):
    for o in ('fastattn','docs'): shutil.copytree(root/o, folder/o)
    shutil.copytree(tests, folder/'tests')
    for o in ('nbs','hubconf.py','pyproject.toml','settings.ini','README.md'): (folder/o).symlink_to(root/o)
    return folder

def make_map(args, folder):
    files = args.files or [f'tests/{o.name}' for o in sorted((root/'tests').glob('test_*.py')) if o.stem not in ('test_nbs','test_site','test_sync','test_package')]
    known = json.loads(args.map.read_text()) if args.map.exists() else {}
    for f in files:
        if in_fork(folder, ['-m','not slow', f], folder/'log', folder/'calls.json'): print((folder/'log').read_text())
        (folder/'log').unlink()
        new = json.loads((folder/'calls.json').read_text())
        known = {k: v for k,v in known.items() if not k.startswith(f+'::')}|new
        args.map.write_text(json.dumps(known))
        print(f, len(new), 'tests', round(sum(o['seconds'] for o in new.values())), 's', flush=True)

def tests_of(known, mutant, budget):
    "Tests that call the function, the quick ones first, of not more than `budget` seconds"
    at,spent,chosen = f"{mutant['file']}:{mutant['first']}",0,[]
    for seconds,name in sorted((o['seconds'],k) for k,o in known.items() if at in o['calls'] and o.get('passed')):
        spent += seconds
        if spent>budget: break
        chosen.append(name)
    return chosen

def run_mutants(args, folder):
    known = {} if args.files else json.loads(args.map.read_text())
    done = json.loads(args.out.read_text()) if args.out.exists() else []
    for mutant,source in mutants(root/'fastattn', args.n, args.seed, args.module):
        if any(all(o[k]==v for k,v in mutant.items()) for o in done): continue
        names = args.files or tests_of(known, mutant, args.budget)
        file = folder/'fastattn'/mutant['file']
        file.write_text(source)
        (folder/'log').write_text('')
        code = in_fork(folder, ['-x', *names], folder/'log', limit=args.limit) if names else 0
        shutil.copy(root/'fastattn'/mutant['file'], file)
        last = [o for o in (folder/'log').read_text().splitlines() if o.startswith(('FAILED','ERROR'))]
        done.append(mutant | dict(tests=len(names), killed=code!=0, by=last[-1].split(' - ')[0] if last else {None: 'time', 0: ''}.get(code, f'exit code {code}')))
        args.out.write_text(json.dumps(done, indent=1))
        print('killed  ' if done[-1]['killed'] else 'SURVIVED', f"{mutant['file']}:{mutant['line']} {mutant['function']}: {mutant['old'][:60]} -> {mutant['new'][:60]}", done[-1]['by'], flush=True)
    print(f"{sum(o['killed'] for o in done)} of {len(done)} killed")

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['map','run'])
    parser.add_argument('files', nargs='*', help='map: test files (default: all that run in the process). run: tests to run for each mutant (default: those that call it)')
    parser.add_argument('-n', type=int, default=40, help='mutants')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--module', default='', help='only files that begin so, such as recipes/')
    parser.add_argument('--tests', type=Path, default=root/'tests', help='the folder of tests')
    parser.add_argument('--map', type=Path, default=Path('mutants-map.json'))
    parser.add_argument('--out', type=Path, default=Path('mutants.json'))
    parser.add_argument('--budget', type=float, default=60., help='seconds of tests for a mutant')
    parser.add_argument('--limit', type=float, default=900., help='seconds after which a mutant counts as killed')
    args = parser.parse_intermixed_args()
    args.map,args.out = args.map.absolute(),args.out.absolute()
    with tempfile.TemporaryDirectory() as folder:
        folder = copied(Path(folder).resolve(), args.tests)
        {'map': make_map, 'run': run_mutants}[args.what](args, folder)
