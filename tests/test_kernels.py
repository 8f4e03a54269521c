"The kernels run in Triton's interpreter and on a GPU where there is one, compile for GPUs without one, and are missed where Triton is missing"
import os,subprocess,sys
from pathlib import Path
import pytest,torch
from commands import Forked
from fastattn.layers import kernels

pytestmark = pytest.mark.device
needs_triton = pytest.mark.skipif(not kernels.has_triton, reason='Triton is not installed')
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')

def python(*args, **env):
    p = subprocess.run([sys.executable, *args], capture_output=True, text=True, env={**os.environ, **env})
    assert not p.returncode, p.stdout+p.stderr

# Triton reads the variable when it is imported: a process for each
@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize('interpret', ['1', pytest.param('0', marks=needs_cuda)], ids=['interpreter','cuda'])
def test_oracles(interpret):
    python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(Path(__file__).with_name('kernels.py')), TRITON_INTERPRET=interpret)

def test_without_triton(tmp_path):
    "All is imported, and the layer works as ever"
    end = Forked(tmp_path, '''
import sys
sys.modules['triton'] = None
import torch
from fastattn.layers.all import *
from fastattn.layers.kernels import has_triton
assert not has_triton and not takes_kernels(torch.device('cuda'))
assert DropConnect(600, 600)(torch.randn(2, 600)).shape==(2,600)''').end()
    assert end.returncode==0, end.stderr

@needs_triton
def test_chosen_on_cuda_only():
    assert [kernels.takes_kernels(torch.device(o)) for o in ('cpu','cuda','cuda:1','meta','mps')]==[False,True,True,False,False]

@needs_triton
@pytest.mark.parametrize('kernel,n', [('_outputs',3), ('_weight_grad',3), ('_input_grad',3), ('_masks',1)])
@pytest.mark.parametrize('dtype,capability,size', [('fp32',80,None), ('bf16',90,1), ('fp64',90,None)])
def test_compiles_for_gpus(kernel, n, dtype, capability, size):
    "To machine code, sizes of 1 included, which Triton compiles as constants"
    if kernels.triton.knobs.runtime.interpret: pytest.skip('the interpreter is on')
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    f,tl = getattr(kernels, kernel),kernels.tl
    fixed = dict(dtype=tl.float64 if dtype=='fp64' else tl.float32, side=kernels._side, **{o: size for o in 'ROI' if size})
    types = [f'*{dtype if n==3 else "i8"}']*n+['i64']+['i32']*4+['constexpr']*2
    signature = {name: 'constexpr' if name in fixed else o for name,o in zip(f.arg_names, types, strict=True)}
    code = kernels.triton.compile(ASTSource(f, signature, fixed), target=GPUTarget('cuda', capability, 32)).asm
    assert len(code['cubin'])
