"Run notebooks and keep their outputs: `python docs/save.py [path]`"
from fastcore.nbio import concat_streams,read_nb,write_nb
from fastcore.script import call_parse
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import nbdev_test

@call_parse(pos=['path'])
def save(path:str=None): # A notebook or directory
    "Run notebooks, save their outputs, and tidy them"
    nbdev_test.__wrapped__(path, flags='slow', save=True, n_workers=1)
    for f in nbglob(path or get_config().nbs_path, as_path=True):
        nb = read_nb(f)
        for c in nb.cells:
            if c.get('outputs'): c.outputs = concat_streams(c.outputs)
        write_nb(nb, f)
        nbdev_clean.__wrapped__(f)
